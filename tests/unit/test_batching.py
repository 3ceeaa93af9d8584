import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.batching import Trajectory, minibatches, pack


def trajectory(prompt: int, completion: int, *, base: int = 0) -> Trajectory:
    """Tokens, log-probabilities and versions that tell where they come from."""
    return Trajectory(
        prompt_ids=[base + i for i in range(prompt)],
        completion_ids=[base + 50 + i for i in range(completion)],
        behaviour_logps=[-(base + i) / 1000 for i in range(completion)],
        versions=[base + i for i in range(completion)],
        advantage=base / 10,
    )


def test_two_sequences_are_laid_end_to_end_longest_first():
    (packed,) = pack([trajectory(1, 1, base=100), trajectory(2, 3, base=200)])
    assert packed.input_ids_I.tolist() == [200, 201, 250, 251, 100]
    assert packed.position_ids_I.tolist() == [0, 1, 2, 3, 0]
    assert packed.index_T.tolist() == [1, 2, 3, 4]
    assert packed.targets_T.tolist() == [250, 251, 252, 150]
    assert packed.behaviour_T.tolist() == pytest.approx([-0.2, -0.201, -0.202, -0.1])
    assert packed.versions_T.tolist() == [200, 201, 202, 100]
    assert packed.advantages_T.tolist() == [20.0, 20.0, 20.0, 10.0]
    assert packed.row_T.tolist() == [1, 1, 1, 0]
    assert (packed.inputs, packed.tokens) == (5, 4)


def test_a_pack_is_filled_to_the_limit_and_no_further():
    packs = pack([trajectory(2, 3)] * 5, max_tokens=8)
    assert [p.inputs for p in packs] == [8, 8, 4]


def test_a_sequence_longer_than_the_limit_gets_a_pack_of_its_own():
    packs = pack([trajectory(2, 3), trajectory(9, 9), trajectory(2, 2)], max_tokens=8)
    assert [p.inputs for p in packs] == [17, 7]
    assert packs[0].row_T.unique().tolist() == [1]


sizes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=40)


@given(sizes=sizes, max_tokens=st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_every_token_is_in_exactly_one_pack_with_its_own_data(sizes, max_tokens):
    trajectories = [trajectory(p, c, base=100 * i) for i, (p, c) in enumerate(sizes)]
    packs = pack(trajectories, max_tokens=max_tokens)
    seen: dict[int, list[int]] = {}
    for packed in packs:
        assert packed.inputs <= max_tokens or len(packed.row_T.unique()) == 1
        for t, row in enumerate(packed.row_T.tolist()):
            seen.setdefault(row, []).append(int(packed.targets_T[t]))
            source, place = trajectories[row], len(seen[row]) - 1
            assert int(packed.versions_T[t]) == source.versions[place]
            assert float(packed.behaviour_T[t]) == pytest.approx(source.behaviour_logps[place])
            assert float(packed.advantages_T[t]) == pytest.approx(source.advantage)
            # The input that predicts token t is the one before it in its own sequence.
            before = [*source.prompt_ids, *source.completion_ids][len(source.prompt_ids) + place - 1]
            assert int(packed.input_ids_I[packed.index_T[t]]) == before
            assert int(packed.position_ids_I[packed.index_T[t]]) == len(source.prompt_ids) + place - 1
    assert seen == {row: list(source.completion_ids) for row, source in enumerate(trajectories)}


@given(sizes=sizes)
@settings(max_examples=60, deadline=None)
def test_blocks_are_rectangles_at_least_half_full_that_give_back_what_they_spread(sizes):
    for packed in pack([trajectory(p, c) for p, c in sizes], max_tokens=200):
        assert [b.start for b in packed.blocks] == [0, *(b.stop for b in packed.blocks[:-1])]
        assert packed.blocks[-1].stop == packed.inputs
        for block in packed.blocks:
            tokens = block.stop - block.start
            assert len(block.spread) == block.rows * block.length <= 2 * tokens
            assert torch.equal(block.spread[block.gather], torch.arange(tokens))
            # A row of the rectangle begins where a sequence begins, and its real tokens come first.
            columns = block.gather % block.length
            assert torch.equal(columns, packed.position_ids_I[block.start : block.stop])


def test_packing_is_deterministic():
    trajectories = [trajectory(2, 1 + i % 5, base=i) for i in range(30)]
    first, second = pack(trajectories, max_tokens=32), pack(trajectories, max_tokens=32)
    assert [p.input_ids_I.tolist() for p in first] == [p.input_ids_I.tolist() for p in second]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Trajectory([], [1], [0.0], [0], 0.0), "at least one of each"),
        (Trajectory([1], [], [], [], 0.0), "at least one of each"),
        (Trajectory([1], [1, 2], [0.0], [0, 0], 0.0), "1 log-probabilities"),
        (Trajectory([1], [1, 2], [0.0, 0.0], [0], 0.0), "1 versions"),
    ],
)
def test_a_broken_trajectory_is_named(broken, message):
    with pytest.raises(ValueError, match=rf"trajectory 1 .*{message}"):
        pack([trajectory(1, 1), broken])


def test_minibatches_split_the_batch_equally_and_by_seed():
    groups = list(range(16))
    parts = minibatches(groups, 4, seed=7)
    assert [len(part) for part in parts] == [4, 4, 4, 4]
    assert sorted(group for part in parts for group in part) == groups
    assert parts == minibatches(groups, 4, seed=7)
    assert parts != minibatches(groups, 4, seed=8)
    assert groups == list(range(16))


def test_minibatches_refuse_what_does_not_divide():
    with pytest.raises(ValueError, match="updates_per_batch"):
        minibatches(list(range(6)), 4, seed=0)
