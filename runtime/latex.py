"""
A faster parser for math-verify: the same expressions and errors, intervals in a fraction of the time.
"""


def parse_in_two_stages():
    """Make latex2sympy, math-verify's parser, try ANTLR's SLL prediction before LL, which is many
    times slower on intervals. What SLL accepts it parses as LL does (ANTLR's documentation of
    PredictionMode); what it rejects is parsed again by LL."""
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy as Parser

    create_parser = Parser.create_parser

    def create(self, latex):
        parser = create_parser(self, latex)
        parser._interp.predictionMode = PredictionMode.SLL
        math_of = parser.math

        def in_two_stages():
            try:
                return math_of()
            except Exception:
                return create_parser(self, latex).math()

        parser.math = in_two_stages
        return parser

    Parser.create_parser = create
