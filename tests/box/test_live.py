"""The meter beside a run, on a GB10's answers as published, on a discrete GPU's, and here."""

import os
import sys
import time
from types import SimpleNamespace

import pytest

from sparklab.box import live
from sparklab.box.live import LiveMeter, allocator_bytes, read_devices
from sparklab.units import GIB, MIB, is_na

# Fixtures of a GB10, written from published figures, not taken from one: NVML's totals are not supported, power, temperature and processes are.
GB10_QUERY = "38.20, 61, [N/A], [N/A]\n"
GB10_APPS = "4242, 12288\n{here}, 30720\n77, [N/A]\n"
GB10_MEMINFO = """MemTotal:       125513728 kB
MemFree:        43515904 kB
MemAvailable:   121320243 kB
Buffers:          301284 kB
Cached:         76102912 kB
SwapCached:            0 kB
Shmem:            114688 kB
SReclaimable:     912384 kB
SwapTotal:      16777212 kB
SwapFree:       16777212 kB
HugePages_Total:       0
"""


def answers(query, apps=""):
    def run(command):
        return "" if command[0] != "nvidia-smi" else apps if "compute-apps" in command[1] else query

    return run


@pytest.fixture
def gb10(tmp_path):
    """/proc of a GB10 that has read a file of 70 GB."""
    files = {"meminfo": GB10_MEMINFO, "pressure/memory": "some avg10=0.40 avg60=0 avg300=0 total=9\nfull avg10=0.10 avg60=0 avg300=0 total=1\n",
             "vmstat": "nr_free_pages 1\npswpin 10\npswpout 20\n", "4242/status": "RssAnon:\t1048576 kB\n", "4242/comm": "ollama\n",
             f"{os.getpid()}/status": "VmRSS:\t2097152 kB\nVmHWM:\t3145728 kB\nRssAnon:\t1048576 kB\n"}  # fmt: skip
    for name, text in files.items():
        path = tmp_path / "proc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "proc"


def test_a_gb10(gb10):
    meter = LiveMeter(True, gb10, answers(GB10_QUERY, GB10_APPS.format(here=os.getpid())))
    first = meter.look()
    assert is_na(first.age_seconds) and is_na(first.device.watts) and first.others == {}
    meter.look_dearly()
    look = meter.look()
    assert (look.device.watts, look.device.celsius) == (38.2, 61.0)
    assert is_na(look.device.total_bytes) and is_na(look.device.used_bytes)  # NOT_SUPPORTED, never a guess
    assert look.device_bytes == 30 * GIB
    assert look.process_bytes == look.held_bytes == look.held_peak_bytes == 31 * GIB  # 1 of them its own memory: one pool
    assert look.others == {"ollama (process 4242)": 13 * GIB}  # what it holds on the device lies in the same pool
    assert 0 <= look.age_seconds < 60
    memory = look.memory
    assert memory.available_bytes / GIB == pytest.approx(115.7, abs=0.05)  # with 41.5 free: the rest is page cache
    assert memory.free_bytes / GIB == pytest.approx(41.5, abs=0.01)
    assert (memory.pressure_percent, memory.stalled_percent, memory.swap_used_bytes) == (0.4, 0.1, 0)
    assert (memory.rss_bytes, memory.rss_peak_bytes) == (2 * GIB, 3 * GIB)
    told = look.to_dict()
    assert told["device"]["total_bytes"] is None and told["memory"]["total_bytes"] == 125513728 * 1024


class Cuda:
    """An allocator that has taken and given back since the driver was asked."""

    reserved = 28 * GIB

    def is_initialized(self):
        return True

    def memory_allocated(self):
        return self.reserved - GIB

    def memory_reserved(self):
        return self.reserved

    def max_memory_reserved(self):
        return 40 * GIB


@pytest.fixture
def cuda(monkeypatch):
    stands = Cuda()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=stands))
    return stands


@pytest.mark.parametrize("unified", [True, False])
def test_what_a_plan_speaks_of_is_not_resident_memory(gb10, cuda, unified):
    meter = LiveMeter(unified, gb10, answers(GB10_QUERY, GB10_APPS.format(here=os.getpid())))
    silent = meter.look()
    assert silent.device_bytes == 28 * GIB  # the driver has said nothing yet
    meter.look_dearly()
    cuda.reserved = 31 * GIB
    look = meter.look()
    assert look.device_bytes == 33 * GIB  # 2 of them the context
    own = GIB if unified else 0  # of 2 that are resident: the rest are mapped files, which can go
    assert look.held_bytes == 33 * GIB + own and look.held_peak_bytes == 42 * GIB + own
    assert look.process_bytes == (look.held_bytes if unified else look.memory.rss_bytes)


def test_a_worker_that_has_not_begun_on_its_gpu_holds_nothing_of_it(gb10):
    for unified, held in ((True, GIB), (False, 0)):
        look = LiveMeter(unified, gb10, answers(""), on_gpu=True).look()
        assert look.held_bytes == look.held_peak_bytes == held and is_na(look.device_bytes)  # not the 2 GiB of resident memory, nor its peak of 3


def test_without_a_device_it_is_resident_memory(gb10):
    look = LiveMeter(False, gb10, answers("")).look()
    assert (look.process_bytes, look.held_bytes, look.held_peak_bytes) == (2 * GIB, 2 * GIB, 3 * GIB) and is_na(look.device_bytes)


def test_swap_traffic_is_a_rate(gb10):
    meter = LiveMeter(True, gb10, answers(""))
    page = os.sysconf("SC_PAGE_SIZE")
    (gb10 / "vmstat").write_text("pswpin 110\npswpout 1020\n")
    began = meter._swapped[0]
    time.sleep(live.LEAST_SECONDS * 1.5)
    look = meter.look()
    seconds = meter._swapped[0] - began
    assert look.swap_in_rate == pytest.approx(100 * page / seconds)
    assert look.swap_out_rate == pytest.approx(1000 * page / seconds)
    assert meter.look().swap_out_rate == look.swap_out_rate  # two looks at once make no rate


def test_discrete_devices_are_summed():
    reading = read_devices(answers("200.5, 60, 24576, 1000\n100.0, 71, 24576, 3000\n", "7, 100\n7, 50\n"))
    assert (reading.watts, reading.celsius) == (300.5, 71)
    assert (reading.total_bytes, reading.used_bytes) == (2 * 24576 * MIB, 4000 * MIB)
    assert reading.held == {7: 150 * MIB}


@pytest.mark.parametrize("query", ["", "No devices were found\n", "[N/A], [N/A], [N/A], [N/A]\n", "[Not Supported], 60\n"])
def test_what_the_driver_does_not_tell_is_na(query):
    reading = read_devices(answers(query))
    assert all(map(is_na, (reading.watts, reading.celsius, reading.total_bytes, reading.used_bytes)))


def test_here_it_looks_by_itself_and_leaves():
    with LiveMeter(False) as meter:
        for _ in range(500):
            look = meter.look()
            if not is_na(look.age_seconds):
                break
            time.sleep(0.01)
        thread = meter._thread
        assert thread.is_alive()
    thread.join(30)
    assert not thread.is_alive()
    assert look.memory.available_bytes > 0
    assert not any(f"process {os.getpid()})" in name for name in look.others)


def test_the_allocator_is_asked_only_where_cuda_is_at_work(monkeypatch):
    import torch

    assert all(map(is_na, allocator_bytes()))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 7)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 9)
    assert allocator_bytes() == (5.0, 7.0, 9.0)


def test_a_cap_is_a_share_of_the_device(monkeypatch):
    from types import SimpleNamespace

    import torch

    from sparklab.engine.cap import cap_device
    from sparklab.units import NA

    said = []
    assert cap_device(8 * GIB, GIB) is None  # no device here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=100 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", said.append)
    assert cap_device(NA, GIB) is None
    assert [cap_device(limit * GIB, 2 * GIB) for limit in (52, 1, 500)] == [0.5, 0.0, 1.0] == said
