"""The field's words instead of paraphrases of them: the glossary of CONTRIBUTING, and how docstrings begin."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READ = ("x3d_tf", "export", "gin", "docs", "benchmarks")
SUFFIXES = {".py", ".md", ".gin"}

# What not to write, in the sense that the glossary lists, by what to write.
PARAPHRASES = {
    "synthetic": r"\bmade[- ]up\b",
    "resume, continue": r"\b(go|goes|going|went|gone) on\b(?! the\b)",
    "evaluate": r"\b(tests?|tested|testing) (a |the |each |its |their )?(network|model|run|checkpoint|detector)s?\b",
    "verify against, compare with": r"\b(hold|holds|held|holding)\b[^.]{0,30}\bagainst\b",
    "exists": r"\b(is|are|was|were) (not |no longer |already )?there\b(?! (is|are|was|were|a|an|no)\b)",
    "complete, atomic": r"\bwhole or not at all\b|\b(is|are|only when|until|once) whole\b",
    "from scratch, again": r"\banew\b",
    "backbone": r"\btrunks?\b",
    "micro-batch": r"\bparts (that|of) (a|the|its) (step's )?batch\b",
    "gradient checkpointing": r"\b(does|do) not keep\b",
    "exponential moving average": r"\baverag(es|ing)( of)? (the )?weights\b",
    "in parallel": r"\bside by side\b",
    "overfit": r"\bby heart\b",
    "stretch": r"(?<!\.)\bsqueez(e|es|ed|ing)\b(?![-_ ](and|exc))",
    "segment": r"\bpieces?\b",
    "people": r"\bpersons\b",
    "metadata": r"\bsays? of (itself|themselves)\b",
    "defaults to": r"\bunless (given|told|said|named)\b",
    "requires": r"\bcomes? with --|\btakes --\w+",
    "for multi-label models": r"\bof several labels\b",
}
OPENINGS = ("What", "Which", "Whether", "How", "Those")


def texts() -> list[tuple[Path, str]]:
    files = [path for name in READ for path in sorted((ROOT / name).rglob("*")) if path.suffix in SUFFIXES]
    return [(path, path.read_text("utf-8")) for path in [*files, ROOT / "README.md"]]


@pytest.mark.parametrize("term", PARAPHRASES)
def test_the_glossarys_terms_are_used(term: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {' '.join(match.group().split())}"
        for path, text in texts()
        for match in re.finditer(PARAPHRASES[term].replace(" ", r"\s+"), text, re.IGNORECASE)
    ]
    assert found == []


def test_the_patterns_find_what_they_are_for() -> None:
    for sentence, term in (
        ("a run goes on where it was", "resume, continue"),
        ("model.keras is there", "exists"),
        ("held\nagainst the paper", "verify against, compare with"),
        ("several persons", "people"),
        ("frames are squeezed", "stretch"),
    ):
        assert re.search(PARAPHRASES[term].replace(" ", r"\s+"), sentence)
    for sentence, term in (
        ("if there is one", "exists"),
        ("squeeze-excitation", "stretch"),
        ("ops.squeeze(x)", "stretch"),
        ("tests of readers", "evaluate"),
    ):
        assert not re.search(PARAPHRASES[term].replace(" ", r"\s+"), sentence)


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    found = []
    for path, text in texts():
        if path.suffix != ".py":
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, documented))
        docs = filter(None, map(ast.get_docstring, nodes))
        found += [f"{path.relative_to(ROOT)}: {doc.splitlines()[0]}" for doc in docs if doc.split()[0] in OPENINGS]
    assert found == []
