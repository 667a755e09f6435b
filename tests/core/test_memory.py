"""Free memory goes back to the system where the process has grown."""

from types import SimpleNamespace

import psutil

from infoq_fx.core import memory


def test_memory_is_returned_after_the_process_has_grown(monkeypatch):
    resident, trims = [1 << 30], []

    def trim(_):
        trims.append(resident[0])
        resident[0] -= 100 << 20

    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=resident[0]))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    monkeypatch.setattr(memory, "_find_trim", lambda: trim)
    monkeypatch.setattr(memory, "_resident_bytes", 0)
    for growth in (0, 100, 50, -500, 100, 50):  # MiB
        resident[0] += growth << 20
        memory.return_free_memory()
    at = [size >> 20 for size in trims]
    assert at == [1024, 1074, 624]
