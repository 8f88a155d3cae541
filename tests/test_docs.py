"""measure/docs_check.py finds nothing wrong with the pages, and would find what is wrong."""

import re

import pytest
from helpers import LLAMA_8B, QWEN3_17B, QWEN_05B, QWEN_7B, QWEN_15B

from measure import docs_check, surprises
from runtime.plan import print_plan

SHAPES = {
    "luffy_7b.py": (QWEN_7B, 8, 80), "grpo_7b.py": (QWEN_7B, 8, 80), "luffy_llama8b.py": (LLAMA_8B, 8, 80),
    "luffy_7b_instruct.py": (QWEN_7B, 8, 80), "sft_7b.py": (QWEN_7B, 8, 80), "luffy_1gpu.py": (QWEN_05B, 1, 24),
    "luffy_1p5b.py": (QWEN_15B, 8, 80), "luffy_qwen3_1p7b.py": (QWEN3_17B, 8, 80), "relift_7b.py": (QWEN_7B, 8, 80),
    "exgrpo_7b.py": (QWEN_7B, 8, 80), "tgpo_7b.py": (QWEN_7B, 8, 80),
}  # fmt: skip


@pytest.fixture
def readme(monkeypatch):
    """A function that makes its text the only page, as README.md or as the page that is named."""

    def put(text, page="README.md"):
        monkeypatch.setattr(docs_check, "read", lambda path: text if path == page else real(path))

    real = docs_check.read
    monkeypatch.setattr(docs_check, "pages", lambda: ["README.md"])
    return put


def test_nothing_is_wrong_with_the_pages():
    assert docs_check.static_faults() == []


def test_a_broken_link_is_found(readme):
    readme(
        "# A *page* of `x`, the 2nd\n[a](#a-page-of-x-the-2nd) [b](docs/nothing.md) [c](LICENSE) [d](#no) [e](https://example.org)\n"
    )
    assert [re.search(r"\]\((\S+)\):", fault)[1] for fault in docs_check.broken_links()] == ["docs/nothing.md", "#no"]


@pytest.mark.parametrize(
    "link",
    ["[`shape`](loss.py)", "[`Verifier`](reward.py)", "[`Roll out`](train.py)", "[`gamma`](train.py)", "[`loss.py`](loss.py)",
     "[the loss](loss.py)"],
)  # fmt: skip
def test_a_link_to_a_name(readme, link):
    readme(link)
    assert docs_check.broken_links() == []


@pytest.mark.parametrize(
    "link,words",
    [
        ("[`shape_of`](loss.py)", "loss.py has no function, class, knob or comment of that name"),
        ("[`hap`](loss.py)", "loss.py has no function"),
        ("[`shape`](model.py)", "model.py has no function"),
        ("[`p.sqrt()`](loss.py)", "loss.py has no function"),
        ("[`Roll`](train.py)", "train.py has no function"),
        ("[`shape`](loss.py#L53)", "a line number is soon wrong"),
        ("[x](out/y)", "there is no out/y"),
    ],
)
def test_a_link_to_a_name_that_is_not_there(readme, link, words):
    readme(link)
    (fault,) = docs_check.broken_links()
    assert words in fault


def test_a_gap_in_the_file_map_is_found(readme):
    text = docs_check.read("docs/files.md")
    assert "\n  guard.py " in text
    readme(text.replace("\n  guard.py ", "\n  guards.py "), "docs/files.md")
    assert docs_check.file_map_faults() == [
        "docs/files.md: the file map lacks runtime/guard.py",
        "docs/files.md: the file map has runtime/guards.py, which does not exist",
    ]


def test_a_wrong_name_in_the_short_file_map_is_found(readme):
    text = docs_check.read("README.md")
    assert "\nloss.py " in text
    readme(text.replace("\nloss.py ", "\nlosses.py "))
    assert docs_check.file_map_faults() == ["README.md: the file map has losses.py, which does not exist"]


def test_commands_and_knobs_that_nothing_knows_are_found(readme):
    readme("""Type `python nothing.py` or `make`.
```sh
for a in 1 2; do
  python a.py --x=$a \\
    --y
done
make lunch  # today
```
```
$ pip install x
  1
```
""")
    typed = ["for a in 1 2; do python a.py --x=$a --y; done", "make lunch", "pip install x", "python nothing.py"]
    assert docs_check.commands("README.md") == typed
    faults = docs_check.unknown_commands()
    assert all(any(f"nothing runs `{command}`" in fault for fault in faults) for command in typed)
    assert any("`make demo` in COMMANDS is no longer on any page" in fault for fault in faults)
    page = "<a href=x>y</a>\n~~~sh\n[a]: b\n[x](LICENSE 'title')\n"
    readme(page + "`--n_techer=2` `--n_teacher=2` `WANDB_MODE=offline python3 a.py`\n")
    assert len(docs_check.unreadable()) == 4
    assert docs_check.unknown_knobs() == ["README.md: --n_techer is no knob of any script"]
    assert docs_check.commands("README.md") == ["WANDB_MODE=offline python3 a.py"]


@pytest.mark.parametrize("file", docs_check.SHORTER)
def test_the_shorter_scripts_are_python(file):
    compile(docs_check.shorter(file), file, "exec")


def test_readme_is_short():
    assert len(docs_check.read("README.md").split()) <= 2500


def test_every_page_is_one_link_away():
    linked = set(re.findall(r"\]\((docs/\w+\.md)[#)]", docs_check.read("README.md")))
    assert {"README.md", *linked} == set(docs_check.pages())


def test_readme_has_the_phases_of_the_loop():
    phases = re.findall(r"^ +# (\d+)\. ([^,:.]+)", docs_check.read("train.py"), re.M)
    assert [int(n) for n, _ in phases] == [*range(1, 11)]
    assert re.findall(r"^(\d+)\. \[`(.+?)`\]\(train\.py\)", docs_check.read("README.md"), re.M) == phases


def test_the_memory_table_is_the_plans(script):
    """README's GiB are the ones that --dry_run=True prints."""
    seen = set()
    for line in docs_check.read("README.md").splitlines():
        names = (
            [name for name in re.findall(r"`(\w+\.py)`", line.split("|")[1]) if name in SHAPES]
            if line.startswith("| `")
            else []
        )
        for name in names:
            numbers = re.findall(r"\d+\.\d", line.split("|")[3])
            if name == "luffy_7b_instruct.py" or not numbers:  # as 7B
                numbers = ["35.6", "50.6"]
            shape, gpus, gib = SHAPES[name]
            lines = []
            assert print_plan(script("train", [f"config/{name}"]).config, shape, 0, gpus, True, gib, lines.append)
            found = re.search(r"update takes (\d+\.\d) .*rollout (\d+\.\d) ", "\n".join(lines))
            assert found and [found[1], found[2]] == numbers, (name, lines[-1])
            seen.add(name)
    assert seen == set(SHAPES)


def test_the_table_of_surprising_verdicts_is_the_graders():
    """The page has what `python measure/surprises.py` prints."""
    assert "\n".join(surprises.table()) in docs_check.read("docs/evaluate.md")


def test_the_ablation_is_ten_lines_and_its_diff_applies():
    page = docs_check.read("docs/first_ablation.md")
    diff = re.search(r"^```diff\n(.*?)^```", page, re.S | re.M)[1]
    context = "".join(f"{line[1:]}\n" for line in diff.splitlines() if line.startswith(" "))
    assert docs_check.read("loss.py").count(context) == 1  # at whichever line
    added = [line for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
    files = re.findall(r"^```python\n# .*?\n(.*?)^```", page, re.S | re.M)
    overlay, test = ([line for line in file.splitlines() if line and not line.startswith(("import", "from"))] for file in files)
    assert added and overlay and test and len(added) + len(overlay) + len(test) <= 10
