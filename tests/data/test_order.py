"""The order is a pure function: complete, identical for any number of processes, cheap to start anywhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.order import (
    all_orders_chi_square,
    compare,
    enter,
    enter_stream,
    feistel_at,
    feistel_permutation,
    position_chi_square,
)
from mocov3_hf.data.draws import STREAM_SHARD_ORDER, STREAM_WINDOW_ORDER, permutation, random_words
from mocov3_hf.data.order import (
    ORDER_VERSION,
    StreamOrder,
    default_lanes,
    rows_of_process,
    sample_order,
    split_rows,
    steps_in_epoch,
)


@st.composite
def layouts(draw):
    """Shard sizes (possibly 0), global batch size, lanes, window, processes, workers, seed, epoch."""
    sizes = draw(st.lists(st.integers(0, 14), min_size=1, max_size=12).filter(any))
    world = draw(st.integers(1, 4))
    batch = world * draw(st.integers(1, max(1, min(8, sum(sizes) // world))))
    lanes = draw(st.sampled_from([lanes for lanes in range(1, batch + 1) if batch % lanes == 0]))
    return sizes, batch, lanes, draw(st.integers(1, 5)), world, draw(st.integers(1, 4)), draw(st.integers(0, 99))


def slow_order(sizes, seed, epoch, batch, window, lanes) -> list[list[tuple[int, int]]]:
    """The streamed order by its definition, row by row: (shard, row) of every step."""
    sequence = [
        (shard, row)
        for shard in permutation(seed, epoch, len(sizes), STREAM_SHARD_ORDER).tolist()
        for row in range(sizes[shard])
    ]
    length = len(sequence) // lanes
    in_lanes = []
    for lane in range(lanes):
        part, seen, start = [], [], lane * length
        for position in range(start, start + length):
            shard, row = sequence[position]
            seen.append((shard, row))
            last_of_shard = row == sizes[shard] - 1
            full = last_of_shard and len({shard for shard, _ in seen}) == window
            if full or position == start + length - 1:
                first = position + 1 - len(seen)
                order = permutation(seed, epoch, len(seen), STREAM_WINDOW_ORDER, start=first)
                part += [seen[index] for index in order.tolist()]
                seen = []
        in_lanes.append(part)
    share = batch // lanes
    return [
        [place for part in in_lanes for place in part[step * share : (step + 1) * share]]
        for step in range(length // share)
    ]


@pytest.mark.slow
@settings(max_examples=70, deadline=None)
@given(layouts(), st.integers(0, 3))
def test_every_sample_once_whatever_the_layout_and_the_world(layout, epoch):
    sizes, batch, lanes, window, world, workers, seed = layout
    order = StreamOrder(tuple(sizes), seed, epoch, batch, window, lanes)
    assert order.steps == sum(sizes) // batch
    seen = []
    for step in range(order.steps):
        whole = order.places(step, range(batch))
        by_process = [
            place
            for process in range(world)
            for rows in split_rows(rows_of_process(batch, process, world), workers)
            for place in StreamOrder(tuple(sizes), seed, epoch, batch, window, lanes).places(step, rows)
        ]
        assert by_process == whole
        seen += whole
    assert len(seen) == len(set(seen)) == order.steps * batch
    assert sum(sizes) - len(seen) < batch
    assert all(0 <= row < sizes[shard] for shard, row in seen)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(layouts(), st.integers(0, 3))
def test_the_streamed_order_is_what_its_definition_says(layout, epoch):
    sizes, batch, lanes, window, _, _, seed = layout
    order = StreamOrder(tuple(sizes), seed, epoch, batch, window, lanes)
    found = [order.places(step, range(batch)) for step in range(order.steps)]
    assert found == slow_order(sizes, seed, epoch, batch, window, lanes)


@pytest.mark.slow
def test_a_process_needs_only_the_shards_of_its_lanes():
    sizes = (50,) * 64
    order = StreamOrder(sizes, 0, 0, 64, window=2, lanes=16)
    needed = []
    for process in range(4):
        rows = rows_of_process(64, process, 4)
        needed.append({shard for step in range(order.steps) for shard, _ in order.places(step, rows)})
    assert all(len(shards) == 16 for shards in needed)
    assert set().union(*needed) == set(range(64))
    # At most one window of each lane at any time.
    assert all(len({s for s, _ in order.places(step, range(4))}) <= 2 for step in range(order.steps))


def test_streamed_epochs_differ_and_are_mixed():
    sizes = (100,) * 20
    epochs = [StreamOrder(sizes, 0, epoch, 50, 4, 5) for epoch in range(2)]
    first, second = (
        [place for step in range(order.steps) for place in order.places(step, range(50))] for order in epochs
    )
    assert first != second
    assert sorted(first) == sorted(second)
    # A batch holds rows of most of the 5 lanes x 4 shards within reach.
    assert len({shard for shard, _ in first[:50]}) > 12


def test_windows_follow_each_other():
    order = StreamOrder((5, 0, 9, 3, 7, 11, 2), 1, 1, 6, 2, 3)
    for lane in range(3):
        window, slot = order.window_at(lane, 0), 0
        while window is not None:
            assert window.start == slot
            assert order.window_at(lane, slot + len(window) - 1) is window
            slot += len(window)
            window = order.window_after(window)
        assert slot == order.lane_length


def slow_element(seed, epoch, length, stream, start, position):
    """An element of a permutation by its definition, in Python integers."""
    columns = next(side for side in range(1, length + 1) if side * side >= length)
    rows = -(-length // columns)

    def number(counter, index):
        return random_words(seed, epoch, torch.tensor([start + counter]), stream, 24)[0, index].item()

    row, column = divmod(position, columns)
    for index in range(0, 24, 2):
        row = (row + number(column, index)) % rows
        column = (column + number(row, index + 1)) % columns
    element = row * columns + column
    return element if element < length else slow_element(seed, epoch, length, stream, start, element)


@pytest.mark.parametrize("length", [1, 2, 3, 9, 12, 23])
def test_a_permutation_is_what_its_definition_says(length):
    found = permutation(5, 2, length, STREAM_WINDOW_ORDER, start=40)
    slow = [slow_element(5, 2, length, STREAM_WINDOW_ORDER, 40, position) for position in range(length)]
    assert found.tolist() == slow


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5000), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_every_sample_once(length, seed, epoch):
    order = sample_order(seed, epoch, length)
    assert torch.equal(order.at(torch.arange(length)).sort().values, torch.arange(length))
    some = torch.arange(length // 3, length)
    assert torch.equal(order.at(some), order.at(torch.arange(length))[length // 3 :])


def test_the_order_never_changes():
    """Runs resume in it: if these numbers change, `ORDER_VERSION` must."""
    assert ORDER_VERSION == 2
    assert sample_order(0, 0, 10).at(torch.arange(10)).tolist() == [1, 6, 8, 5, 7, 9, 0, 4, 2, 3]
    assert sample_order(7, 3, 1_281_167).at(torch.arange(4)).tolist() == [230818, 39293, 624548, 239228]
    ends = torch.tensor([0, 1, 10**9 - 1])
    assert sample_order(2**64 - 1, 99, 10**9).at(ends).tolist() == [585847977, 723369634, 395031716]


def test_seeds_and_epochs_differ():
    first, *others = (sample_order(*which, 1000).at(torch.arange(1000)) for which in ((0, 0), (0, 1), (1, 0)))
    assert all((first == other).sum() < 10 for other in others)


def test_any_step_of_a_billion_samples_is_entered_at_once():
    found = enter(10**9)
    for name in ("first", "middle", "last"):
        assert found[name]["seconds"] < 1
        assert found[name]["MB"] < 100
    streamed = enter_stream(1000, 1_000_000)
    assert streamed["seconds"] < 1
    assert streamed["MB"] < 100


@pytest.mark.slow
@pytest.mark.parametrize("length", [100, 1000])
def test_it_shuffles_like_sorted_random_numbers(length):
    """Displacement, neighbors, cycles, chi-square and more, over seeds and epochs."""
    table = compare(length, repetitions=150)
    worst = min(table, key=lambda name: table[name]["p"])
    assert table[worst]["p"] > 0.001, (worst, table[worst])
    for name, row in table.items():
        if "expected" in row:
            assert abs(row["feistel"] - row["expected"]) < 4 * row["standard_error"], (name, row)


@pytest.mark.slow
def test_small_orders_and_places_are_uniform():
    assert all_orders_chi_square(feistel_permutation, 4, 1000) > 0.001
    assert position_chi_square(feistel_at, 1001, 500, 600) > 0.001


def test_the_remainder_differs_each_epoch():
    steps = steps_in_epoch(103, 10)
    left_out = [set(sample_order(0, epoch, 103).at(torch.arange(steps * 10, 103)).tolist()) for epoch in range(3)]
    assert steps == 10
    assert len(left_out[0]) == 3
    assert left_out[0] != left_out[1] != left_out[2]


def test_batches_that_do_not_fit_are_refused_with_the_repair():
    with pytest.raises(ValueError, match="larger than the data set of 100 images: lower it to at most 100"):
        steps_in_epoch(100, 101)
    with pytest.raises(ValueError, match="is not divisible by 3 processes: choose a multiple of 3, for example 63"):
        rows_of_process(64, 0, 3)
    with pytest.raises(ValueError, match=r"process_index must be in \[0, 2\), got 2"):
        rows_of_process(64, 2, 2)
    with pytest.raises(ValueError, match="lanes must divide the global batch size 10, got 3"):
        StreamOrder((20,), 0, 0, 10, 1, 3)
    with pytest.raises(ValueError, match="at least 1 shard, got 0"):
        StreamOrder((20,), 0, 0, 10, 0, 2)


def test_parts_and_lanes():
    assert split_rows(range(10, 20), 3) == [range(10, 13), range(13, 16), range(16, 20)]
    assert split_rows(range(2), 5) == [range(1), range(1, 2)]
    assert split_rows(range(4), 0) == [range(4)]
    assert [default_lanes(batch) for batch in (1, 7, 60, 256, 4096, 17)] == [1, 7, 15, 16, 16, 1]
