"""Who teaches whom.

Each is a function `(peers, teacher)` of the number of peers and the index of the one in office; it returns pairs
(source, student). Sources 0 to P - 1 are the peers, P to 2 P - 1 their averages, and 2 P is the served answer.
"""

Pairs = list[tuple[int, int]]


def leader(peers: int, teacher: int) -> Pairs:
    """The teacher in office teaches all others, and listens to nobody (streamkd)."""
    return [(teacher, student) for student in range(peers) if student != teacher]


def mutual(peers: int, teacher: int) -> Pairs:
    """Every peer learns from every other (deep mutual learning, Zhang et al. 2018)."""
    return _others(peers)


def ensemble(peers: int, teacher: int) -> Pairs:
    """All learn from the served answer (Lan et al. 2018, there an ensemble of branches)."""
    return [(2 * peers, student) for student in range(peers)]


def average(peers: int, teacher: int) -> Pairs:
    """Every peer learns from the averaged weights of the others (Wu and Gong 2021)."""
    return [(peers + source, student) for source, student in _others(peers)]


def self(peers: int, teacher: int) -> Pairs:
    """Each learns from its own averaged weights (Tarvainen and Valpola 2017; beside a memory: Michel et al. 2024).

    They remember what the weights of the moment are about to forget: with `ema_horizon = 100` and T = 4, of use where
    classes come one after the other.
    """
    return [(peers + index, index) for index in range(peers)]


def static(peers: int, teacher: int) -> Pairs:
    """As `leader`, from a teacher that stops learning after `freeze_after` updates (Hinton et al. 2015)."""
    return leader(peers, teacher)


def none(peers: int, teacher: int) -> Pairs:
    """Nobody teaches (streamkd)."""
    return []


def _others(peers: int) -> Pairs:
    return [(source, student) for source in range(peers) for student in range(peers) if source != student]
