"""The reservoir keeps every presented example with the same probability; herding chooses those near a class's mean."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from pgp_hf.methods.memory import Examples, HerdedMemory, Reservoir, herd, rgb_bytes


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


def test_presentations_count_and_not_images():
    """Of 1,000 images that are presented in five epochs, 500 places hold some twice: 406 or so are different."""
    memory = Reservoir(500)
    for epoch in range(5):
        for first in range(0, 1000, 100):
            memory.add(examples(range(first, first + 100)), (epoch, first))
    assert memory.presented == 5000 and len(memory) == 500
    assert len(set(kept(memory))) == pytest.approx(1000 * (1 - 0.9**5), abs=30)  # 409.5; the standard deviation is 9


@pytest.mark.parametrize(("side", "size"), [(32, 3_072), (112, 37_632), (224, 150_528)])
def test_images_count_as_8_bit_rgb_at_their_own_resolution(side, size):
    images = [{"image": Image.new(mode, (side, side))} for mode in ("RGB", "L")]
    assert rgb_bytes(images, [0, 1]) == [size, size]


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


# ---- herding ---------------------------------------------------------------------------------------------------------


def directions(*degrees):
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_the_order_of_herding():
    features = directions(0, 20, 55, 80, 110)
    mean = features.mean(0)
    assert mean.tolist() == pytest.approx([0.46898, 0.61713], abs=1e-5)
    order = herd(features, 5).tolist()
    assert order == [2, 1, 4, 0, 3]  # with replacement 2, 2, 2, 0, 4; by the released code 2, 0, 4, 1, 3
    errors = [(mean - features[order[:k]].mean(0)).norm().item() for k in range(1, 6)]
    assert errors == pytest.approx([0.2275, 0.2900, 0.1144, 0.1179, 0], abs=1e-4)
    lengths = torch.tensor([3.0, 0.1, 7.0, 1.0, 20.0])[:, None]
    assert herd((lengths * features).float(), 5).tolist() == order  # directions alone count


@pytest.mark.parametrize("count", [1, 10, 20, 60, 90])
def test_a_smaller_choice_is_the_beginning_of_a_larger_one(count):
    features = torch.randn(60, 9, generator=torch.Generator().manual_seed(0))
    order = herd(features, count).tolist()
    assert order == herd(features, 60).tolist()[:count] and len(set(order)) == len(order) == min(count, 60)


def test_of_equals_the_first_is_taken():
    one, two = directions(30)[0], directions(-30)[0]
    assert herd(torch.stack([two, one, one, two]), 4).tolist() == [0, 1, 2, 3]
    assert herd(torch.ones(5, 3), 3).tolist() == [0, 1, 2]


def herded(count=7):
    memory = HerdedMemory()
    for task, label in enumerate((4, 0, 2)):
        places = torch.stack([torch.full((count,), task), (5 * torch.arange(count)) % 11], 1)
        memory.add(label, places, [100 * label + i for i in range(count)])
    return memory


def test_exemplars_are_given_up_from_the_end():
    memory = herded()
    before = {label: rows.clone() for label, rows in memory.kept.items()}
    assert len(memory) == 21 and memory.bytes == 7 * 600 + 3 * 21
    memory.reduce(3)
    assert list(memory.kept) == [4, 0, 2] and len(memory) == 9
    assert all(torch.equal(rows, before[label][:3]) for label, rows in memory.kept.items())
    assert memory.labels().tolist() == [4, 4, 4, 0, 0, 0, 2, 2, 2]
    assert memory.places() == [[t, i] for t in range(3) for i in (0, 5, 10)]


def test_a_memory_of_exemplars_goes_on_from_what_it_was():
    memory, other = herded(), HerdedMemory()
    other.load(memory.tensors())
    assert list(other.kept) == [4, 0, 2] and all(
        torch.equal(other.kept[label], memory.kept[label]) for label in (4, 0, 2)
    )
    other.load({})
    assert len(other) == 0 and other.tensors() == {} and other.places() == [] and len(other.labels()) == 0


@pytest.mark.parametrize(
    "change",
    [{"places": torch.zeros(21, 3, dtype=torch.int64)}, {"labels": torch.zeros(21)}, {"more": torch.zeros(1)}],
)
def test_exemplars_of_another_kind(change):
    with pytest.raises(ValueError, match=r"holds the integers labels \(N,\), places \(N, 2\) and sizes"):
        HerdedMemory().load({**herded().tensors(), **change})
