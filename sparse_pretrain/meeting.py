"""What the ranks that a launcher started tell each other beside training: what to train, how it ended, who is missing.

They meet at MASTER_ADDR:MASTER_PORT, at a store of keys and values that torchrun keeps there, or else rank 0. Clocks
are monotonic ones, so that it does not matter if the time of day jumps.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from sparse_pretrain.cluster import LOST, Rank
from sparse_pretrain.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

MEET_SECONDS = 300  # for the ranks of a launch to find each other
SILENCE_SECONDS = 120  # without a sign of life of rank 0, while it prepares a run
ANSWER_SECONDS = 10  # for ranks that are there to say so, once one is missed
LEAVE_SECONDS = 60  # for a rank that is there to hear how a launch ended: it may still be importing
WAIT_SECONDS = 10  # until it is told which ranks are waited for
NAME_SECONDS = 10  # for the name of rank 0's machine to be known: it may be as new as the machine
BEAT_SECONDS = 2
CONTINUES = "the same command continues from the last checkpoint"


class Meeting:
    """What the ranks of a launch tell each other.

    Raises (making one):
        UserError: address or port are not those of rank 0, or rank 0 did not come.
        SystemExit: another process has this rank's number, or rank 0 another number of ranks. It is told.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.store = _connect(rank)
        self.announced = 0
        self._ended = threading.Event()
        # the process group has a store of its own: torchrun's, kept over restarts, has addresses of ranks of before
        if rank.number == 0:
            self._training_store = self._serve()
            self.store.set("ranks", str(rank.ranks))
            self.store.set("port", str(self._training_store.port))
        self.store.wait(["port"], timedelta(seconds=MEET_SECONDS))
        if (there := int(self.store.get("ranks"))) != rank.ranks:
            variable = rank.counted.partition("=")[0]
            _refuse(self.store, UserError(variable, rank.ranks, f"{there}, as on rank 0"))
        taken = self.store.add(f"here/{rank.number}", 1) > 1
        if taken and "TORCHELASTIC_RUN_ID" not in os.environ:  # whose store may be that of ranks of before
            _refuse(self.store, _taken(rank))
        os.environ.update(  # for torch and Lightning
            RANK=str(rank.number),
            WORLD_SIZE=str(rank.ranks),
            LOCAL_RANK=str(rank.local),
            GROUP_RANK=str(rank.node),
            MASTER_ADDR=rank.address,
            MASTER_PORT=self.store.get("port").decode(),
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
        if rank.number == 0:
            threading.Thread(target=self._beat, daemon=True).start()

    def _serve(self) -> TCPStore:
        from torch.distributed import TCPStore

        return TCPStore(self.rank.address, 0, None, True, timedelta(seconds=MEET_SECONDS), False)

    def _beat(self) -> None:
        store, beats = _client(self.rank), 0
        with contextlib.suppress(RuntimeError):
            while not self._ended.wait(BEAT_SECONDS):
                beats += 1
                store.set("beats", str(beats))

    def announce(self, message: dict[str, Any]) -> int:
        """Rank 0: tell the others, once all are there, the next thing to do; returns its number.

        Raises:
            UserError: some do not come.
            SystemExit: one is not as it should be, and has told it.
        """
        self._wait_for_all()
        return self._send(message)

    def _wait_for_all(self) -> None:
        start, told = time.monotonic(), False
        while missing := [str(n) for n in range(self.rank.ranks) if not self.store.check([f"here/{n}"])]:
            if self.store.check(["refused"]):
                raise SystemExit(UserError.exit_code)
            names = f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
            waited = time.monotonic() - start
            if waited > MEET_SECONDS:
                raise UserError(
                    "WORLD_SIZE",
                    f"{self.rank.ranks}, but nothing of {names} in {MEET_SECONDS} s",
                    "the ranks there are",
                )
            if waited > WAIT_SECONDS and not told:
                told = True
                print(f"waiting for {names} of {self.rank.ranks} ({self.rank.counted})", file=sys.stderr, flush=True)
            time.sleep(0.1)

    def _send(self, message: dict[str, Any]) -> int:
        self.announced += 1
        self.store.set(f"message/{self.announced}", json.dumps(message))
        return self.announced

    def next_message(self) -> dict[str, Any]:
        """The others: what rank 0 announces next.

        Raises:
            RankLost: rank 0 is gone.
        """
        self.announced += 1
        key, beats, heard = f"message/{self.announced}", b"", time.monotonic()
        try:
            while not self.store.check([key]):
                now = self.store.get("beats") if self.store.check(["beats"]) else b""
                if now != beats:
                    beats, heard = now, time.monotonic()
                if time.monotonic() - heard > SILENCE_SECONDS:
                    raise RankLost(f"rank 0 did not answer for {SILENCE_SECONDS} s; {CONTINUES}", self.rank.number == 1)
                time.sleep(0.1)
            return dict(json.loads(self.store.get(key)))
        except RuntimeError as error:
            raise RankLost(f"rank 0 was lost; {CONTINUES}", self.rank.number == 1) from error

    def left(self, job: int, how: str) -> None:
        """Say that this rank has left a training: `ended`, `failed` with an error that it tells, or `lost` others."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"{job}/{self.rank.number}", how)

    def has_left(self, job: int, number: int, within: float) -> bool:
        """Whether another rank has left a training too, or does so within some seconds."""
        deadline = time.monotonic() + within
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline:
                if self.store.check([f"{job}/{number}"]):
                    return True
                time.sleep(0.1)
        return False

    def lost(self, job: int, error: BaseException, timeout: int) -> RankLost:
        """Find out who is missing, after the others did not answer this rank."""
        number = self.rank.number
        self.left(job, "lost")
        abort_communication()  # so that those who wait for this rank learn of it
        missing, failed, lost = set(range(self.rank.ranks)) - {number}, False, {number}
        deadline = time.monotonic() + ANSWER_SECONDS
        try:
            while missing and time.monotonic() < deadline:
                for other in sorted(missing):
                    if self.store.check([f"{job}/{other}"]):
                        how = self.store.get(f"{job}/{other}")
                        failed |= how == b"failed"
                        lost |= {other} if how == b"lost" else set()
                        missing.remove(other)
                time.sleep(0.1)
        except RuntimeError:  # the store is gone, and who keeps it
            missing, lost = {0}, {number} if number == 1 else {1}
        if failed and not missing:
            return RankLost("", False)
        return RankLost(describe_missing(missing, error, timeout), number == min(lost))

    def end(self, exit_code: int) -> None:
        """Rank 0: let the others end too, and keep the store until they have heard it."""
        self._ended.set()
        with contextlib.suppress(RuntimeError):
            self._send({"exit_code": exit_code})
            start, others = time.monotonic(), range(1, self.rank.ranks)
            while left := [n for n in others if not self.store.check([f"bye/{n}"])]:
                there = exit_code != LOST and any(self.store.check([f"here/{n}"]) for n in left)
                if time.monotonic() - start > (LEAVE_SECONDS if there else ANSWER_SECONDS / 2):
                    break
                time.sleep(0.05)

    def leave(self) -> None:
        """The others: the last word."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"bye/{self.rank.number}", "1")


class RankLost(Exception):
    """Another rank of the run is gone or does not answer.

    Args:
        message: one sentence.
        tells: whether this rank is the one to tell it.
    """

    exit_code = LOST

    def __init__(self, message: str, tells: bool) -> None:
        super().__init__(message if tells else "")


def describe_missing(missing: set[int], error: BaseException | None, timeout: int) -> str:
    names = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, sorted(missing)))}"
    if not missing:
        cause = f" ({str(error).splitlines()[0][:200]})" if error is not None and str(error) else ""
        return f"the ranks lost the connection to each other{cause}; {CONTINUES}"
    if error is not None and re.search("timed? ?out", str(error), re.IGNORECASE):
        return f"{names} did not answer for {timeout} s (trainer.timeout); {CONTINUES}"
    return f"{names} {'were' if len(missing) > 1 else 'was'} lost: killed, or the machine is gone; {CONTINUES}"


def communication_error(error: BaseException) -> BaseException | None:
    """The error of talking to other ranks that this one is, or came of."""
    from torch.distributed import DistError

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DistError) or (isinstance(seen, RuntimeError) and "/gloo/" in str(seen)):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def last_words(text: str) -> None:
    """Tell why this rank ends: on rank 0 here, on others to who started them, who tells what rank 0 does not."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)
        return
    from torch.distributed import TCPStore

    with contextlib.suppress(RuntimeError):
        port = int(os.environ["MASTER_PORT"])
        store = TCPStore(os.environ["MASTER_ADDR"], port, None, False, timedelta(seconds=10), False)
        store.set(f"words/{os.environ['RANK']}", text)


def exit_now(exit_code: int) -> NoReturn:
    """End without waiting for threads that talk to ranks which are gone, and would abort the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def set_timeout(seconds: int) -> None:
    """How long this process waits for others, from now on."""
    from torch.distributed import distributed_c10d

    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def abort_communication() -> None:
    from torch.distributed import distributed_c10d, is_initialized

    if is_initialized():
        with contextlib.suppress(RuntimeError, ValueError):
            distributed_c10d._abort_process_group()


def _connect(rank: Rank) -> Store:
    from torch.distributed import PrefixStore, TCPStore

    _check_name(rank.address)
    if rank.number == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        in_use = UserError("MASTER_PORT", f"{rank.port}, which is in use", "a free port of rank 0's node")
        try:
            _check_server(rank)  # TCPStore itself would try for minutes
            server = TCPStore(rank.address, rank.port, None, True, timedelta(seconds=MEET_SECONDS), False)
        except (OSError, RuntimeError) as error:
            there = _ask(rank)
            if there is not None and there.check(["ranks"]):
                _refuse(there, _taken(rank))
            raise in_use from error
        return PrefixStore(_prefix(), server)
    start, told = time.monotonic(), rank.number != 1
    while (waited := time.monotonic() - start) < MEET_SECONDS:
        with contextlib.suppress(OSError), socket.create_connection((rank.address, rank.port), timeout=10):
            break
        if waited > WAIT_SECONDS and not told:
            told = True
            print(f"waiting for rank 0 at {rank.address}:{rank.port}", file=sys.stderr, flush=True)
        time.sleep(0.2)
    store = _ask(rank)
    if store is None:
        raise UserError(
            "MASTER_ADDR", f"{rank.address}:{rank.port}, where rank 0 is not", "the address of rank 0, and a free port"
        )
    return store


def _check_name(address: str) -> None:
    """Raises UserError if no machine has this name."""
    deadline = time.monotonic() + NAME_SECONDS
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError("MASTER_ADDR", f"{address}, which is no machine's name", "rank 0's machine") from error
        time.sleep(0.5)


def _check_server(rank: Rank) -> None:
    """See that what rank 0 serves at its address and port can be reached there.

    Raises:
        OSError: the port is in use.
        UserError: the address is not that of this machine.
    """
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", rank.port))
        server.listen()
        try:
            socket.create_connection((rank.address, rank.port), timeout=ANSWER_SECONDS).close()
        except OSError as error:
            raise UserError(
                "MASTER_ADDR", f"{rank.address}, which does not lead to rank 0's machine", "the address of that machine"
            ) from error


def _taken(rank: Rank) -> UserError:
    return UserError("RANK", f"{rank.number}, which another process has too", "another number for each process")


def _refuse(store: Store, error: UserError) -> NoReturn:
    """End this launch, whose variables cannot be right; of all ranks that find so the first tells it."""
    if store.add("refused", 1) == 1:
        print(f"error: {error}", file=sys.stderr)
    exit_now(error.exit_code)


def _ask(rank: Rank) -> Store | None:
    """The store that rank 0 keeps; None if it is something else that answers there."""
    found: list[Store] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            found.append(_client(rank))

    # in a thread: a client waits without end for the answer of a server of another kind
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return found[0] if found else None


def _client(rank: Rank) -> Store:
    from torch.distributed import PrefixStore, TCPStore

    return PrefixStore(_prefix(), TCPStore(rank.address, rank.port, None, False, timedelta(seconds=10), False))


def _prefix() -> str:
    """Of this launch's keys: torchrun's agent may keep its store over restarts."""
    return f"sparse-pretrain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
