import torch
from hypothesis import HealthCheck, settings

# Small models are fastest on one thread, and its sums are always added in the same order.
torch.set_num_threads(1)

# A law holds on a busy machine, too: examples may take as long as they take.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
