"""
The tokenizer beside a model: read as its own tokenizer.json says, with the tokens at which a response ends and those that no
text may hold.
"""

import os
import re

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils import cached_file

from configurator import UserError, first_line, not_here

# What a tokenizer must give back: spaces, tabs, line breaks, digits, LaTeX, tags, other scripts, an emoji of three code points,
# and punctuation that "clean up" would move. Letters with accents are composed, because many tokenizers compose them (NFC).
PROBE = (
    " User: A farm  has 5 < 9\tcows ,\n\n   so 12,345.60 don't fit .\r\n$\\frac{1}{2}\\times x^2_{i} \\ne 7$ é Ω 東京の家"
    " \u200b\N{WOMAN}\u200d\N{PERSONAL COMPUTER} <think>\n1 + 1</think>\n\\boxed{2} !"
)
TAGS = ("<think>", "</think>")  # text here, although some tokenizers call them special


def load_tokenizer(model):
    """The tokenizer of a folder or hub name, with more attributes:

    stop_ids     list of the ids at which a response ends: those of generation_config.json, or else of config.json, and EOS
    ignored_ids  other ids that these files call ends
    control      regular expression for a control token in text, such as <|im_end|>
    lossless     does it give every text back? If not, gives_back() looks at each

    transformers chooses a class by the model's config, and the class may read tokenizer.json in a way of its own: a byte-level
    tokenizer beside a Llama loses all spaces. So a probe is compared with what the library `tokenizers` makes of that file. If
    they differ, the file is loaded as it is.

    Raises UserError without tokenizer.json, EOS or chat template, if the probe still differs or loses characters, and if a
    trace that follows a prompt would begin with a space of the tokenizer's.
    """
    try:
        path = os.path.join(model, "tokenizer.json") if os.path.isdir(model) else cached_file(model, "tokenizer.json")
        # Without these files transformers would make a tokenizer up, or give new ids to special tokens.
        if os.path.isdir(model) and not (os.path.isfile(path) and os.path.isfile(os.path.join(model, "tokenizer_config.json"))):
            raise UserError(f"model {model} has no tokenizer: copy tokenizer.json and tokenizer_config.json there")
        own = Tokenizer.from_file(path)
        try:
            tokenizer = read_by(AutoTokenizer, model)
            fault = fault_of(tokenizer, own) or tokenizer.get_vocab() != own.get_vocab()  # a class may add tokens
        except Exception as e:  # the class does not fit the file
            fault = e
        if fault:
            tokenizer = read_by(PreTrainedTokenizerFast, model)
            fault = fault_of(tokenizer, own)
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"no tokenizer loads from model {model}{not_here(model)}: {first_line(e)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {model} has no eos_token: name one in its tokenizer_config.json")
    if fault:
        raise UserError(f"the tokenizer of {model} corrupts text: {fault}; copy the files of the model's first release")
    if (joined := tokenizer.decode([i for text in "12" for i in tokenizer.encode(text, add_special_tokens=False)])) != "12":
        raise UserError(f"the tokenizer of {model} begins each text with a space: '1' and '2' after it give {joined!r}; choose"
                        " a model whose tokenizer adds none")  # fmt: skip
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {model} has no chat template: add one to its tokenizer_config.json")
    tokenizer.stop_ids, tokenizer.ignored_ids = stop_ids(model, tokenizer)
    added = [*own.get_added_tokens_decoder().values(), *tokenizer.added_tokens_decoder.values()]
    tokenizer.lossless = is_byte_level(own) and not any(token.lstrip or token.rstrip for token in added)
    # A template's own marks are control tokens, too: DeepSeek's are not called special. An added word, or spaces, are no marks.
    used = {t.content for t in added if t.special or (t.content[:1] in "<[" and t.content in str(tokenizer.chat_template))}
    names = {*used.difference(TAGS), *tokenizer.convert_ids_to_tokens(tokenizer.stop_ids)}
    tokenizer.control = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))
    return tokenizer


def read_by(kind, model):
    tokenizer = kind.from_pretrained(model, trust_remote_code=False)
    tokenizer.clean_up_tokenization_spaces = False  # it turns "a , b" into "a, b"
    return tokenizer


def fault_of(tokenizer, own):
    """How transformers' tokenizer departs from `own`, which `tokenizers` made of the same file, or both from the text; None if
    they do not. The special tokens of the chat template are part of the probe."""
    added, used = tokenizer.get_added_vocab(), f"{tokenizer.chat_template}{tokenizer.eos_token}"
    marks = [token for token in added if token in used]
    for mark in marks:
        if own.token_to_id(mark) != added[mark]:
            return f"{mark} is {added[mark]} by tokenizer_config.json, {own.token_to_id(mark)} by tokenizer.json"
    if getattr(own.model, "dropout", None):
        return "dropout in its tokenizer.json cuts one text in several ways"
    own.no_truncation()
    own.no_padding()
    text = PROBE + "".join(marks)
    ids = own.encode(text, add_special_tokens=False).ids
    read = tokenizer.encode(text, add_special_tokens=False)
    wanted = text if has_all_bytes(own) else own.decode(ids, skip_special_tokens=False)
    for found in (tokenizer.decode(ids), tokenizer.decode(read)):
        if found != wanted:
            at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted)))
            return f"{wanted[at : at + 12]!r} comes back as {found[at : at + 12]!r}"
    return None if read == ids else "transformers cuts it into other tokens than its tokenizer.json"


def has_all_bytes(own):
    return own.get_vocab().keys() >= {*ByteLevel.alphabet()} or own.token_to_id("<0x0A>") is not None


def is_byte_level(own):
    """Has the tokenizer a token for every byte, and no step that changes text? NFC (Qwen) is none: it composes accents, which
    Unicode calls the same text."""
    steps = b"".join(step.__getstate__() for step in (own.normalizer, own.pre_tokenizer) if step)
    kinds = {*re.findall(rb'"type":"(\w+)"', steps)}
    return has_all_bytes(own) and b"Removed" not in steps and kinds <= {b"Sequence", b"NFC", b"Split", b"Digits", b"ByteLevel"}


def gives_back(tokenizer, ids, text):
    """Do a text's ids decode to that text? It costs nothing where every text's do."""
    return tokenizer.lossless or tokenizer.decode(ids) == text


def stop_ids(model, tokenizer):
    """The ids at which a response ends, the tokenizer's EOS first, and the configs' other ids, which do not end it: only those
    of added tokens count, because a config may hold the default of its family, some piece of text to this tokenizer."""

    def of_config():
        config = PreTrainedConfig.get_config_dict(model)[0]
        return next((c["eos_token_id"] for c in (config, config.get("text_config") or {}) if "eos_token_id" in c), None)

    sources = {
        "generation_config.json": lambda: GenerationConfig.from_pretrained(model).eos_token_id,
        "config.json": of_config,  # the second choice, as in transformers
    }
    found = None
    for name, read in sources.items():
        try:
            found = read() if found is None else found
        except Exception as e:  # it may be missing
            if os.path.exists(file := os.path.join(model, name)):
                raise UserError(f"{file} is damaged ({first_line(e)}): copy it again") from None
    found = found if isinstance(found, list) else [] if found is None else [found]
    if odd := [i for i in found if type(i) is not int]:
        raise UserError(f"the eos_token_id of {model} is {odd[0]!r:.80}: write a token's id, or a list of ids, in its configs")
    ends = dict.fromkeys([tokenizer.eos_token_id, *(i for i in found if i in tokenizer.added_tokens_decoder)])
    return list(ends), [i for i in found if i not in ends]


def ends_in_words(tokenizer):
    """For the log: where responses and traces end."""
    names = [f"{tokenizer.decode([i])!r} ({i})" for i in tokenizer.stop_ids]
    ignored = f"; no special tokens, so no ends: {tokenizer.ignored_ids}" if tokenizer.ignored_ids else ""
    return f"responses end at {' or '.join(names)}, traces in {names[0]}{ignored}"


def check_same_ids(ours, theirs):
    """Raise UserError unless the teacher model's tokenizer has the policy's tokens under the same ids. It may have further
    tokens."""
    a, b = ({i: token for token, i in t.get_vocab().items()} for t in (ours, theirs))
    if different := [i for i in a if a[i] != b.get(i)]:
        i = min(different)
        raise UserError(f"the teacher model's tokenizer differs in {len(different)} of {len(a)} tokens: id {i} is {a[i]!r} for"
                        f" the policy and {b.get(i)!r} for the teacher; choose models of one family")  # fmt: skip


def check_same_tokens(ours, theirs):
    """Raise UserError unless the teacher model, which reads the policy's token ids, has the same tokens and the same EOS."""
    check_same_ids(ours, theirs)
    if ours.eos_token_id != theirs.eos_token_id:
        ends = [f"{t.eos_token!r} ({t.eos_token_id})" for t in (ours, theirs)]
        raise UserError(f"the policy's EOS is {ends[0]}, the teacher model's {ends[1]}: choose a teacher that was trained to"
                        " emit this EOS, or move its end there by prepare.py align")  # fmt: skip


def render_prompt(tokenizer, messages):
    """[{role, content}, ...] -> the text before the response. Training and evaluation both use this function."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def response_text(tokenizer, ids):
    """A response as the verifier and people read it: all tokens except the one that ended it."""
    return tokenizer.decode(ids[:-1] if ids and ids[-1] in tokenizer.stop_ids else ids)
