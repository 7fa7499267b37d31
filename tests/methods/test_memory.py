"""The reservoir: every presented example is kept with the same probability, as a function of its key alone."""

from __future__ import annotations

import pytest
import torch

from pgp_hf.methods.memory import Examples, Reservoir


def examples(numbers):
    numbers = torch.as_tensor(numbers)
    places = torch.stack([torch.zeros_like(numbers), numbers], 1)
    return Examples(places, numbers % 3, numbers[:, None] + torch.tensor([0.0, 0.5]))


def kept(memory):
    return memory.examples.places[:, 1].tolist()


@pytest.mark.parametrize("parts", [[8], [3, 5], [1, 1, 4, 2]])
def test_each_of_eight_examples_is_among_three_with_the_same_probability(parts):
    counts = torch.zeros(8)
    for seed in range(3000):
        memory, first = Reservoir(3), 0
        for step, size in enumerate(parts):
            memory.add(examples(range(first, first + size)), (seed, step))
            first += size
        counts[kept(memory)] += 1
        assert len(memory) == 3 and memory.presented == 8
    assert torch.allclose(counts / 3000, torch.tensor(0.375), atol=0.03)


def test_while_there_is_room_examples_stay_in_order_and_whole():
    memory = Reservoir(5)
    assert len(memory) == 0 and memory.tensors() == {}
    memory.add(examples([7, 2]), (0,))
    memory.add(examples([4]), (1,))
    assert kept(memory) == [7, 2, 4] and memory.examples.labels.tolist() == [1, 2, 1]
    assert memory.examples.logits.tolist() == [[7.0, 7.5], [2.0, 2.5], [4.0, 4.5]]


def test_rows_stay_together_when_they_are_replaced():
    memory = Reservoir(4)
    for step in range(30):
        memory.add(examples(range(5 * step, 5 * step + 5)), (1, step))
    numbers = memory.examples.places[:, 1]
    assert all(torch.equal(*pair) for pair in zip(memory.examples, examples(numbers), strict=True))
    assert numbers.max() > 100  # the last ones do get in


def test_what_has_been_handed_out_does_not_change():
    memory = Reservoir(2)
    memory.add(examples([0, 1]), (0,))
    before = memory.tensors()
    memory.add(examples(range(2, 40)), (1,))
    assert before["places"][:, 1].tolist() == [0, 1] != kept(memory)


def test_without_capacity_nothing_is_kept():
    memory = Reservoir(0)
    memory.add(examples([0, 1]), (0,))
    assert len(memory) == 0 and memory.presented == 2


def test_draws_are_uniform_independent_and_a_function_of_the_key():
    memory, state = Reservoir(4), torch.get_rng_state()
    memory.add(examples(range(4)), (0,))
    drawn = memory.draw(2, 4000, (5, 1))
    assert torch.equal(drawn, memory.draw(2, 4000, (5, 1))) and not torch.equal(drawn, memory.draw(2, 4000, (5, 2)))
    pairs = torch.bincount(4 * drawn[0] + drawn[1], minlength=16) / 4000
    assert torch.allclose(pairs, torch.tensor(1 / 16), atol=0.02)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="the memory is empty"):
        Reservoir(4).draw(1, 1, (0,))


def test_a_memory_goes_on_from_what_it_was():
    one, other = Reservoir(3), Reservoir(3)
    one.add(examples(range(9)), (0,))
    other.load(one.tensors(), one.presented)
    for memory in (one, other):
        memory.add(examples(range(9, 30)), (1,))
    assert kept(one) == kept(other)
    other.load({}, 0)
    assert len(other) == other.presented == 0


def test_a_state_of_another_size():
    memory = Reservoir(3)
    memory.add(examples(range(9)), (0,))
    with pytest.raises(ValueError, match="a memory of 5 images after 9 holds places, labels, logits of 5 rows"):
        Reservoir(5).load(memory.tensors(), 9)
    with pytest.raises(ValueError, match="it is another's"):
        Reservoir(3).load({"places": torch.zeros(3, 2)}, 9)
