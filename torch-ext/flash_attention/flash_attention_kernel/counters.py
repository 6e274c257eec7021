"""Zeros for kernels that count, and leave zeros behind."""

import torch
import triton

SIZE = 4  # int32 for a call: 16 bytes, as the addresses are that plans were made with
GRAPHS = 1 << 14  # calls of CUDA graphs whose zeros are there before: 256 KiB

_of_stream = {}  # (device, stream) -> zeros, which the calls of a stream use one after the other
_pools = {}  # device -> [zeros for graphs, how many calls have theirs]


def captured(device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def zeros(device):
    """[SIZE] int32 zeros for a kernel of the current stream; while it is captured, some that no
    other call has, as a graph may run beside other work of the stream."""
    if device.type != "cuda":  # a test's
        return torch.zeros(SIZE, dtype=torch.int32, device=device)
    if captured(device):
        return _for_graph(device)
    key = (device.index, triton.runtime.driver.active.get_current_stream(device.index))
    found = _of_stream.get(key)
    if found is None:
        if device not in _pools:
            pool = torch.zeros(SIZE * GRAPHS, dtype=torch.int32, device=device)
            torch.cuda.current_stream(device).synchronize()  # graphs may run on any stream
            _pools[device] = [pool, 0]
        found = _of_stream[key] = torch.zeros(SIZE, dtype=torch.int32, device=device)
    return found


def _for_graph(device):
    """Zeros for one call of a graph: of the pool, which costs a replay nothing, while it lasts."""
    pool = _pools.get(device)
    if pool is None or pool[1] == GRAPHS:
        return torch.zeros(SIZE, dtype=torch.int32, device=device)
    pool[1] += 1
    return pool[0][SIZE * (pool[1] - 1) : SIZE * pool[1]]
