from typing import Any

import pytest
import torch

from grains_ext.decoder import DecoderView
from grains_ext.scoring import pad_batch, position_ids_of
from grains_ext.steering.bank import SteeringBank
from grains_ext.steering.gate import Gate
from grains_ext.steering.vectors import SteeringVectors
from tests.models import tiny_model
from tests.test_apply import INPUT_IDS, random_vectors

NEW = {"max_new_tokens": 5, "min_new_tokens": 5}
IDS = [(1, 20, 30, 40, 50), (1, 21, 31), (1, 22, 32, 42), (1, 23, 33, 43, 53)]


def members(**options: Any) -> list[SteeringVectors]:
    """Of unlike blocks, strengths and block strengths; numbered 0 to 2."""
    all_blocks, some, one = (
        random_vectors(seed=1),
        random_vectors([1, 3], 2),
        random_vectors([2], 3),
    )
    return [
        SteeringVectors(all_blocks.directions, 0.4, **options),
        SteeringVectors(some.directions, 1.1, block_strengths={3: -0.5}, **options),
        SteeringVectors(one.directions, 0.8, **options),
    ]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_rows_equal_each_run_alone(normalize: bool, positions: Any, dtype: torch.dtype) -> None:
    """In one batch, bit for bit with a batch that is steered as a whole."""
    model = tiny_model("llama", dtype=dtype)
    bank = SteeringBank(members(normalize=normalize))
    ids, mask = pad_batch(IDS, pad_id=3)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids_of(mask)}
    plain = model(**inputs).logits
    chosen = [0, 2, -1, 1]
    with bank.applied(model, positions=positions) as handle:
        handle.rows(chosen)
        mixed = model(**inputs).logits
    assert torch.equal(mixed[2], plain[2])
    for row, member in enumerate(chosen):
        if member >= 0:
            with bank.members[member].applied(model, positions=positions):
                alone = model(**inputs).logits
            assert torch.equal(mixed[row], alone[row])
            assert not torch.equal(mixed[row], plain[row])


@torch.no_grad()
def test_under_beam_search_and_several_sequences() -> None:
    model = tiny_model("llama")
    bank = SteeringBank(members())
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, **NEW}
    chosen = [1, -1, 0]
    prompts = torch.tensor([[1, 20, 30], [1, 21, 31], [1, 22, 32]])
    with bank.applied(model) as handle:
        handle.rows(chosen, repeats=3)
        together = model.generate(prompts, **options)
        handle.rows(chosen)
        with pytest.raises(ValueError, match=r"given 3 entries .*the batch has 9 rows.*repeats="):
            model.generate(prompts, **options)
        alone = []
        for prompt, member in zip(prompts, chosen, strict=True):
            handle.rows([member], repeats=3)
            alone.append(model.generate(prompt[None], **options))
    assert torch.equal(together, torch.cat(alone))


@torch.no_grad()
def test_rows_and_strengths_change_while_it_runs() -> None:
    """As a server does between steps: the same as a handle made anew."""
    model = tiny_model("llama")
    bank = SteeringBank(members())
    steps: list[tuple[list[int], list[float] | None]] = [
        ([0, 0], [0.2, 0.9]),
        ([2, 0], [0.2, 0.9]),
        ([2, -1], [1.5, 0.0]),
        ([1, 1], None),
    ]
    plain = model(INPUT_IDS).logits

    def alone(member: int, row: int, strength: float | None) -> torch.Tensor:
        if member < 0:
            return plain[row]
        with bank.members[member].applied(model, strength):
            return model(INPUT_IDS).logits[row]

    expected = [
        torch.stack([alone(m, row, strengths and strengths[row]) for row, m in enumerate(rows)])
        for rows, strengths in steps
    ]
    with bank.applied(model) as handle:
        for (rows, strengths), logits in zip(steps, expected, strict=True):
            handle.rows(rows, strengths=strengths)
            assert torch.equal(model(INPUT_IDS).logits, logits)
        handle.strengths = [0.0, 2.0, 0.0]
        assert handle.strengths == [0.0, 2.0, 0.0]
        with pytest.raises(ValueError, match="read `strengths`"):
            _ = handle.strength
        doubled = model(INPUT_IDS).logits
        handle.strength = 1.1
        assert not torch.equal(model(INPUT_IDS).logits, doubled)
        assert handle.strength == 1.1


@torch.no_grad()
def test_gates_of_members() -> None:
    """Only the rows of the member whose gate is shut are left alone."""
    model = tiny_model("llama")
    with DecoderView.of(model).capture([0], positions=-1) as captured:
        model(INPUT_IDS)
    towards_first = captured[0][0] - captured[0][1]
    middle = float((captured[0] @ towards_first).mean())
    gate = Gate(0, towards_first, middle, "probe")
    free, gated = random_vectors(seed=1), random_vectors(seed=2).with_gate(gate)
    plain = model(INPUT_IDS).logits
    with SteeringBank([free, gated]).applied(model) as handle:
        handle.rows([1, 1])
        behind = model(INPUT_IDS).logits
        assert handle.decisions[1].tolist() == [True, False]
        assert not torch.equal(behind[0], plain[0])
        assert torch.equal(behind[1], plain[1])
        handle.rows([-1, 0])
        other = model(INPUT_IDS).logits
        assert torch.equal(other[0], plain[0])
        assert not torch.equal(other[1], plain[1])


def test_wrong_banks() -> None:
    with pytest.raises(ValueError, match="bank is empty"):
        SteeringBank([])
    with pytest.raises(ValueError, match=r"one hidden_size, got \[3, 32\]"):
        SteeringBank([random_vectors(), SteeringVectors({0: torch.ones(3)})])
    with pytest.raises(ValueError, match=r"one normalize, got \[False, True\]"):
        SteeringBank([random_vectors(), *members(normalize=False)])
    bank = SteeringBank(members())
    assert len(bank) == 3
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="2 strengths for 3 vectors"):
        bank.apply(model, [1.0, 2.0])
    assert not any(block._forward_hooks for block in DecoderView.of(model).blocks)
    with bank.applied(model) as handle:
        with pytest.raises(ValueError, match=r"call handle.rows\(\[...\]\) first"):
            model(INPUT_IDS)
        with pytest.raises(ValueError, match=r"0 to 2 or -1 \(leave alone\).*got \[3, -2\]"):
            handle.rows([0, 3, -2])
        with pytest.raises(ValueError, match="1 strengths for 2 rows"):
            handle.rows([0, 1], strengths=[1.0])
        with pytest.raises(ValueError, match=r"finite in float32, got \[nan\]"):
            handle.rows([0], strengths=[float("nan")])
        handle.rows([0])
        with pytest.raises(ValueError, match="given 1 entries"):
            model(INPUT_IDS)
