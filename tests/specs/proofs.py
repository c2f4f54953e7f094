"""What is proven of every page of `model_specs/`, and the table that shows it.

`PROOFS` is read twice: by the tests, each of which runs for the shapes that `of` gives it, and by
`scripts/families_table`, which writes a check mark where such a test runs. So a mark stands for a test; what `MISSING`
takes away from the one shows in the other, with its reason.
"""

from dataclasses import dataclass

import pytest
from tiny_models import FAMILIES

TOLERANCE = 1e-5  # relative, fp32


@dataclass(frozen=True, kw_only=True)
class Proof:
    """One column of the table: what a test holds against whom."""

    column: str
    claim: str
    test: str  # module.function, in this folder


PROOFS = {
    "logits": Proof(
        column="logits, gradients",
        claim="logits and the gradient of every tensor equal those of transformers in fp32, relative error ≤ 1e-5, on "
        "texts longer than the model's context and ten of its windows",
        test="test_families.test_logits_and_all_gradients_equal_transformers",
    ),
    "bf16": Proof(
        column="bf16",
        claim="logits in bf16 are no farther from those in fp32 than 1.15 times as far as transformers' in bf16 are, "
        "and no farther from these than √2 times that (the median token, where there are experts)",
        test="test_families.test_bf16_logits_are_as_near_to_fp32_as_those_of_transformers",
    ),
    "packed": Proof(
        column="packed",
        claim="documents packed in a row have the logits of each document alone, relative error ≤ 1e-5",
        test="test_families.test_documents_of_a_packed_row_equal_each_document_alone",
    ),
    "names": Proof(
        column="names",
        claim="every tensor makes the way from the checkpoint to its role and back, and from its role to GGUF and back",
        test="test_families.test_every_tensor_makes_both_round_trips",
    ),
    "saved": Proof(
        column="saved",
        claim="a saved folder loads in transformers with equal logits, bit for bit",
        test="test_families.test_a_saved_folder_has_the_same_logits_in_transformers",
    ),
    "lora": Proof(
        column="LoRA",
        claim="LoRA on every linear role, trained for 5 steps, has the losses of PEFT on the transformers model, "
        "relative error ≤ 1e-5 at each step, and ends at the same A and B",
        test="test_family_lora.test_five_steps_of_lora_equal_those_of_peft",
    ),
    "generation": Proof(
        column="generation",
        claim="greedy answers to a batch of unequal prompts equal those of transformers to each alone, token for token",
        test="test_families.test_greedy_answers_with_a_cache_equal_those_of_transformers",
    ),
    "f32": Proof(
        column="GGUF f32",
        claim="the GGUF file has the logits of transformers in llama.cpp, absolute error ≤ 1e-4 (5e-3 where a GELU is "
        "computed, which llama.cpp reads off a table of f16 numbers), on texts as long as the file's own context",
        test="test_family_gguf.test_f32_logits_equal_those_of_transformers",
    ),
    "f16": Proof(
        column="f16",
        claim="the same, absolute error ≤ 1e-2",
        test="test_family_gguf.test_f16_logits_are_near_those_of_transformers",
    ),
    "q8_0": Proof(
        column="q8_0",
        claim="the same, mean KL divergence ≤ 1e-3 nats a token",
        test="test_family_gguf.test_q8_0_says_nearly_the_same",
    ),
    "mutations": Proof(
        column="wrong switches",
        claim="each switch of the page, set wrongly, changes the logits by 5 % at least",
        test="test_mutations.test_every_wrong_switch_is_caught",
    ),
}

MISSING: dict[str, dict[str, str]] = {}  # a shape of a page → what is not proven of it, and why

TABLE = """\

## What is proven

✅ stands for a test that runs for every shape of the page; `tests/tiny_models.py` lists the shapes. All models are
tiny, random, and made by transformers.

{table}
{notes}
{claims}
"""


def of(key: str) -> pytest.MarkDecorator:
    """Runs a test for every shape of which `PROOFS[key]` is claimed."""
    return pytest.mark.parametrize("shape", shapes(key))


def shapes(key: str) -> list[str]:
    assert key in PROOFS
    return [shape for shape in FAMILIES if key not in MISSING.get(shape, {})]


def proofs_section() -> str:
    """The part of `model_specs/README.md` that shows what is proven of which page."""
    notes: list[str] = []
    rows = [["page", *(proof.column for proof in PROOFS.values())], ["---"] + [":-:"] * len(PROOFS)]
    for page in dict.fromkeys(sorted(page for page, _, _ in FAMILIES.values())):
        rows.append([f"`{page}`", *(_cell(page, key, notes) for key in PROOFS)])
    return TABLE.format(
        table="\n".join(f"| {' | '.join(row)} |" for row in rows),
        notes="".join(f"\n[{number}] {note}  " for number, note in enumerate(notes, 1)) + ("\n" if notes else ""),
        claims="\n".join(f"- **{proof.column}**: {proof.claim} (`{proof.test}`)" for proof in PROOFS.values()),
    )


def _cell(page: str, key: str, notes: list[str]) -> str:
    """A mark where a shape of the page is proven, and the numbers of the notes that say of which shapes it is not."""
    own = [shape for shape, (name, _, _) in FAMILIES.items() if name == page]
    marks = ["✅"] if any(key not in MISSING.get(shape, {}) for shape in own) else []
    for shape in own:
        if reason := MISSING.get(shape, {}).get(key):
            note = f"{shape}: {reason}"
            if note not in notes:
                notes.append(note)
            marks.append(f"[{notes.index(note) + 1}]")
    return " ".join(marks)
