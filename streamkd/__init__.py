"""Online mutual distillation for streaming data.

A small cohort of peer models predicts every batch, then learns it: from the labels, from one another, and from
prioritized memories of the past. To read in this order: `batch`, `engine`, `cohort`, `peer`, `served`, `pool`,
`schedules`, `losses`, `features`, `replay`, `drift`.
"""

from streamkd.batch import UNLABELLED, Batch, Output
from streamkd.cohort import Cohort
from streamkd.distillation import Distillation
from streamkd.drift import DriftWatch
from streamkd.engine import Engine
from streamkd.errors import StreamkdError
from streamkd.peer import Peer
from streamkd.pool import LabelRates, Pool
from streamkd.replay import Recall, ReplayBuffer
from streamkd.report import Report
from streamkd.river_peer import RiverPeer
from streamkd.roles import Election
from streamkd.schedules import Signals
from streamkd.served import Served

__all__ = [
    "UNLABELLED",
    "Batch",
    "Cohort",
    "Distillation",
    "DriftWatch",
    "Election",
    "Engine",
    "LabelRates",
    "Output",
    "Peer",
    "Pool",
    "Recall",
    "ReplayBuffer",
    "Report",
    "RiverPeer",
    "Served",
    "Signals",
    "StreamkdError",
]
