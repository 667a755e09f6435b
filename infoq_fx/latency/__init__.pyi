from .latency_cost import FileLatency as FileLatency
from .latency_cost import LatencyCost as LatencyCost
from .latency_cost import load_latency as load_latency
from .measurement import measure_latency as measure_latency
