import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from worlds import batches, engine

from monitoring.prequential import MAJORITY, NO_CHANGE, WINDOW, Tally
from monitoring.trace import MOST_POINTS, Trace
from streamkd.report import Scored


def test_the_measures_are_those_of_their_definitions() -> None:
    made, tally, scored = engine(), Tally(), []
    for batch in batches():
        report = made.step(batch)
        tally.update(report)
        scored.append(report.scored)
    y = torch.cat([part.y for part in scored]).numpy()
    for name in ("served", "a", "b", "c"):
        predicted = torch.cat([part.predicted[name] for part in scored]).numpy()
        loss = torch.cat([part.log_loss[name] for part in scored]).double().mean()
        measures = tally.measures()[name]
        accuracy = (predicted == y).mean()
        chance = sum((predicted == k).mean() * (y == k).mean() for k in range(4))
        assert measures.accuracy == pytest.approx(accuracy)
        assert measures.balanced_accuracy == pytest.approx(
            np.mean([(predicted[y == k] == k).mean() for k in np.unique(y)])
        )
        assert measures.cohen_kappa == pytest.approx((accuracy - chance) / (1 - chance))
        assert measures.log_loss == pytest.approx(float(loss), rel=1e-4)
        still = tally.measures()[NO_CHANGE].accuracy
        assert measures.temporal_kappa == pytest.approx((accuracy - still) / (1 - still))


def test_the_baselines_know_only_the_batches_before() -> None:
    made, tally = engine(), Tally()
    labels = []
    for batch in batches(320):
        tally.update(made.step(batch))
        labels.append(batch.y.tolist())
    last, past, still, most = 0, [0], 0, 0
    for batch_labels in labels:
        favourite = int(np.bincount(past[1:] or [0], minlength=4).argmax())
        still += sum(y == last for y in batch_labels)
        most += sum(y == favourite for y in batch_labels)
        last = batch_labels[-1]
        past += batch_labels
    assert tally.measures()[NO_CHANGE].accuracy == pytest.approx(still / 320)
    assert tally.measures()[MAJORITY].accuracy == pytest.approx(most / 320)
    assert tally.measures()[NO_CHANGE].temporal_kappa == 0


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 1500), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_recent_accuracy_is_that_of_the_last_thousand(sizes: list[int], seed: int) -> None:
    chance, tally, every = torch.Generator().manual_seed(seed), Tally(), list[Tensor]()
    assert tally.recent("served") == 0
    told = engine().step(batches()[0])
    for size in sizes:
        y, answers = torch.randint(0, 3, (size,), generator=chance), torch.randint(0, 3, (4, size), generator=chance)
        scored = Scored(("a", "b", "c", "served"), y, answers, torch.zeros(4, size))
        tally.update(told._replace(scored=scored))
        every.append(scored.right)
    for name, hits in zip(("a", "b", "c", "served"), torch.cat(every, 1), strict=True):
        assert tally.recent(name) == pytest.approx(float(hits[-WINDOW:].double().mean()))


def test_a_trace_stays_small_and_in_order_however_long_the_stream() -> None:
    made, tally, trace = engine(), Tally(), Trace()
    report = made.step(batches()[0])
    for _ in range(30_000):
        tally.update(report)
        trace.update(report, tally)
    assert len(trace.records) <= MOST_POINTS
    assert trace.records == sorted(trace.records)
    assert trace.records[-1] > 0.99 * tally.scored
    assert {len(points) for points in trace.accuracy.values()} == {len(trace.records)}
