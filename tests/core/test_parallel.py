import threading
import time
from collections.abc import Iterator

import pytest
import torch

from loftq_cli.core import parallel
from loftq_cli.core.parallel import all_threads, each, one_thread_each


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_every_piece_once_and_on_several_threads() -> None:
    done: list[int] = []
    workers = set()

    def work(piece: int) -> None:
        done.append(piece)
        workers.add(threading.current_thread().name)
        assert torch.get_num_threads() == 1
        assert not torch.is_grad_enabled()
        time.sleep(0.005)

    each(work, 30)
    assert sorted(done) == list(range(30))
    assert len(workers) == 3
    assert torch.get_num_threads() == 3
    each(work, 0)
    assert len(done) == 30


@pytest.mark.usefixtures("three_threads")
def test_an_error_ends_the_others_and_comes_out() -> None:
    done: list[int] = []

    def work(piece: int) -> None:
        time.sleep(0.002)
        if piece == 4:
            raise ValueError("piece 4")
        done.append(piece)

    with pytest.raises(ValueError, match="piece 4"):
        each(work, 1000)
    assert len(done) < 20
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_the_number_of_threads_is_put_back() -> None:
    with one_thread_each():
        assert torch.get_num_threads() == 1
        with one_thread_each():
            assert torch.get_num_threads() == 1
        with all_threads():
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [3]  # a thread that is born later is not affected


@pytest.mark.usefixtures("three_threads")
def test_from_several_threads_at_once() -> None:
    totals = [0] * 4

    def outer(index: int) -> None:
        lock = threading.Lock()

        def work(piece: int) -> None:
            with lock:
                totals[index] += piece

        torch.set_num_threads(3)
        for _ in range(20):
            each(work, 10)

    threads = [threading.Thread(target=outer, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert totals == [20 * 45] * 4


@pytest.mark.usefixtures("three_threads")
def test_a_share_of_the_threads_leaves_torch_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_most", None)
    parallel.use_at_most(2)
    workers = set()

    def work(piece: int) -> None:
        workers.add(threading.current_thread().name)
        time.sleep(0.005)

    each(work, 30)
    assert len(workers) == 2
    with one_thread_each(), all_threads():
        assert torch.get_num_threads() == 3
