"""measure/docs_check.py finds nothing wrong with the pages, and would find what is wrong."""

import re

from helpers import LLAMA_8B, QWEN_05B, QWEN_7B, QWEN_15B

from measure import docs_check
from runtime.plan import print_plan

SHAPES = {
    "luffy_7b.py": (QWEN_7B, 8, 80), "grpo_7b.py": (QWEN_7B, 8, 80), "luffy_llama8b.py": (LLAMA_8B, 8, 80),
    "luffy_7b_instruct.py": (QWEN_7B, 8, 80), "sft_7b.py": (QWEN_7B, 8, 80), "luffy_1gpu.py": (QWEN_05B, 1, 24),
    "luffy_1p5b.py": (QWEN_15B, 8, 80),
}  # fmt: skip


def test_links_and_commands():
    assert (
        docs_check.broken_links() + docs_check.unreadable() + docs_check.unknown_commands() + docs_check.unknown_knobs() == []
    )


def test_what_is_broken_is_found(monkeypatch):
    page = """# A *page* of `x`, the 2nd
[a](#a-page-of-x-the-2nd) [b](docs/nothing.md) [c](LICENSE) [d](#no) [`MIT License`](LICENSE#L2)
[`MIT License`](LICENSE#L1) [`MIT License`](LICENSE#L999) [e](https://example.org)
Type `python nothing.py` or `make`.
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
"""
    monkeypatch.setattr(docs_check, "pages", lambda: ["README.md"])
    real = docs_check.read
    monkeypatch.setattr(docs_check, "read", lambda path: page if path == "README.md" else real(path))
    faults = docs_check.broken_links()
    assert [re.search(r"\]\((\S+)\):", fault)[1] for fault in faults] == [
        "docs/nothing.md",
        "#no",
        "LICENSE#L2",
        "LICENSE#L999",
    ]
    assert faults[2].endswith("it stands on [1]: python measure/docs_check.py --fix")
    typed = ["for a in 1 2; do python a.py --x=$a --y; done", "make lunch", "pip install x", "python nothing.py"]
    assert docs_check.commands("README.md") == typed
    faults = docs_check.unknown_commands()
    assert all(any(f"`{command}` is run by nothing" in fault for fault in faults) for command in typed)
    assert any("`make demo` in COMMANDS is in no page any more" in fault for fault in faults)
    page = "<a href=x>y</a>\n~~~sh\n[a]: b\n[x](LICENSE 'title')\n"
    page += "`--n_techer=2` `--n_teacher=2` `WANDB_MODE=offline python3 a.py`\n"
    assert len(docs_check.unreadable()) == 4
    assert docs_check.unknown_knobs() == ["README.md: --n_techer is no knob of any script"]
    assert docs_check.commands("README.md") == ["WANDB_MODE=offline python3 a.py"]
    page = "[`mean`](loss.py#L1) [x](out/y)"
    assert "take words that stand on one line alone" in docs_check.broken_links()[0]


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


def test_the_ablation_is_ten_lines():
    page = docs_check.read("docs/first_ablation.md")
    diff = re.search(r"^```diff\n(.*?)^```", page, re.S | re.M)[1]
    added = [line for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
    files = re.findall(r"^```python\n# .*?\n(.*?)^```", page, re.S | re.M)
    overlay, test = ([line for line in file.splitlines() if line and not line.startswith(("import", "from"))] for file in files)
    assert added and overlay and test and len(added) + len(overlay) + len(test) <= 10
