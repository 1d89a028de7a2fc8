"""Champion and challenger: another folder beside a served classifier, asked in its shadow, then in its place, and back.

Every version of a model has an engine of its own, so that one which cannot be loaded, or dies, leaves the others alone:

    shadow      the challenger's engine gives way to every other process; it gets a share of what is asked, after the
                champion has answered, and nothing while others wait: its answers are only compared
    switched    a fresh engine at full priority, loaded and asked before it takes over; the former stays, to go back to

A request belongs to the version that it found when it came, to its end. `challengers.json`, beside the folders, says
what is current: it is on the disk before the switch is made, and a server that starts again goes on with it.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from lmworks.base.errors import FormatError, InputError, LmworksError, from_os_error
from lmworks.base.files import read_json, write_json
from lmworks.serve.challenger_counts import Counts, Tally, read
from lmworks.serve.challenger_folders import check, check_again, names
from lmworks.serve.challenger_versions import OWN, Contest, Version
from lmworks.serve.monitor import Watches
from lmworks.serve.refusals import Refused, refusal
from lmworks.serve.service import labels_of
from lmworks.serve.supervisor import Model, Supervisor

STATE, FORMAT = "challengers.json", 1
LOADING = 300.0  # seconds that a challenger may take until it is ready
LOOK = 0.02
AGAIN = 2.0  # seconds until what could not be written down is written again
BUSY = 4  # requests in the champion's engine beside which the shadow is not asked
PATIENCE = 60.0  # seconds that the shadow's answer is waited for
BACKLOG = 4  # requests in the shadow's
LINGER = 1.0  # seconds that an engine out of use lives on at least, for requests that had found it
LOW = 19  # how much the shadow's engine gives way


class Challengers:
    """Every model that can be challenged: classifiers that give each text one label."""

    def __init__(self, folder: str | Path, supervisor: Supervisor, watches: Watches, counts: Counts) -> None:
        """Read what was current. Raises InputError for no folder, and where nothing is served that is challenged."""
        self.folder, self.supervisor, self.watches = Path(folder), supervisor, watches
        if not self.folder.is_dir():
            raise InputError("there is no such folder of challengers", where=str(folder), fix="mkdir it")
        self.counts, self.turn, self.tasks = counts, asyncio.Lock(), set[asyncio.Task[None]]()
        self.engines: list[Supervisor] = []  # ours, to be closed at the end
        self.contests: dict[str, Contest] = {}
        self.unwritten = ""  # why STATE does not say what is current
        for name, model in supervisor.models.items():
            if labels_of(model.spec):
                watch = watches.watches.get(name)
                own = Version(OWN, model, None if watch is None else watch.monitor)
                self.contests[name] = Contest(own, own)
        if not self.contests:
            raise InputError("--challengers needs a classifier that gives each text one of several labels",
                             found=", ".join(supervisor.models))  # fmt: skip
        if (self.folder / STATE).is_file():
            kept = read_json(self.folder / STATE)
            try:
                self.recall(dict(kept["models"]))
            except (KeyError, TypeError, ValueError, AttributeError):
                raise FormatError("this is not what a server wrote", where=str(self.folder / STATE),
                                  fix="remove it: the folder of the command line then answers") from None  # fmt: skip

    def recall(self, known: dict[str, Any]) -> None:
        """Go on where a server ended; what cannot be used any more is told, and the server's own folder answers."""
        for name, contest in ((name, one) for name, one in self.contests.items() if name in known):
            kept = known[name]
            contest.share, contest.switched = float(kept["share"]), bool(kept["switched"])
            contest.other = None if kept["other"] is None else str(kept["other"])
            if contest.other == OWN:
                contest.loaded = contest.own
            if current := str(kept["current"]):
                try:
                    contest.current = self.prepare(contest, current, low=False)
                except LmworksError as error:
                    self.fall_back(contest, current, error.what)
                else:
                    self.watches.follow(name, contest.current.monitor)

    def fall_back(self, contest: Contest, name: str, why: str) -> None:
        """Let the folder of the command line answer, as the current one cannot."""
        contest.problem = f"{name} cannot be served, {Path(contest.own.model.spec.folder).name} answers: {why}"
        contest.current, contest.other, contest.loaded, contest.switched = contest.own, None, None, False
        contest.seal = ""
        self.watches.follow(contest.own.model.spec.name, contest.own.monitor)
        sys.stderr.write(f"challenger: {contest.problem}\n")

    def broken(self, contest: Contest, version: Version, why: str = "") -> None:
        """Do without a version whose folder its engine could not read again, or whose files are others by now."""
        why = version.model.problem.what if version.model.problem else why
        if contest.current is version and contest.current is not contest.own:
            self.fall_back(contest, version.name, why)
        elif contest.loaded is version:
            contest.loaded, contest.problem = None, f"{version.name}: {why}"
        else:
            return
        self.spawn(self.retire(version))

    def prepare(self, contest: Contest, name: str, *, low: bool, seal: str = "") -> Version:
        """Return a version whose engine is not started yet. Raises InputError for one that cannot take over."""
        try:
            if seal:
                check_again(self.folder, name, seal)
            spec, monitor, seal = check(self.folder, name, contest.own.model.spec, contest.own.monitor)
        except OSError as error:
            raise from_os_error(error, "the challenger's folder cannot be read") from None
        engine = Supervisor([spec], most=self.supervisor.most, seconds=self.supervisor.seconds, nice=LOW if low else 0)
        engine.on_end = None if low else self.supervisor.on_end
        self.engines.append(engine)
        engine.recheck = partial(check_again, self.folder, name, seal)
        version = Version(name, engine.models[spec.name], monitor, low, seal)
        engine.on_failure = partial(self.broken, contest, version)
        return version

    async def load(self, contest: Contest, name: str, *, low: bool, seal: str = "") -> Version:
        """Return a version that answers, of these files. Raises InputError; then nothing is left of it."""
        version = await asyncio.to_thread(self.prepare, contest, name, low=low, seal=seal)
        try:
            await version.engine.start()
            await self.wait(contest, version)
        except BaseException:
            await self.retire(version, 0)
            raise
        return version

    async def wait(self, contest: Contest, version: Version) -> None:
        """Wait until a version is loaded. Raises InputError where it cannot be, or reads less than the champion."""
        model, until = version.model, time.monotonic() + LOADING
        while model.state != "ready":
            if model.state == "failed" or version.engine.restarts > 0 or time.monotonic() > until:
                why = model.problem.what if model.problem else "its engine ended" if version.engine.restarts else "slow"
                raise InputError("the challenger cannot be loaded", found=f"{version.name}: {why}")
            await asyncio.sleep(LOOK)
        longest = contest.own.model.facts.get("max_input_length", 0)
        if (model.facts.get("max_input_length") or 0) < (longest or 0):
            raise InputError("the challenger reads shorter texts", found=f"{model.facts['max_input_length']} tokens",
                             expected=f"{longest} tokens")  # fmt: skip

    async def retire(self, version: Version | None, seconds: float = LINGER) -> None:
        """End a version's engine once nobody waits for it."""
        if version is None or version.engine not in self.engines:
            return
        await asyncio.sleep(seconds)
        while version.engine.tickets and not version.low:
            await asyncio.sleep(LOOK)
        if version.engine in self.engines:
            self.engines.remove(version.engine)
            await version.engine.close()

    async def open(self) -> None:
        """Start what is current; a challenger is loaded again meanwhile."""
        for name, contest in self.contests.items():
            if contest.current is not contest.own:
                await contest.current.engine.start()
            self.spawn(self.go_on(name, contest))

    async def go_on(self, name: str, contest: Contest) -> None:
        """See the current version come up, and load the one in its shadow."""
        if (version := contest.current) is not contest.own:
            try:
                await self.wait(contest, version)
            except LmworksError as error:
                self.broken(contest, version, error.found or error.what)
        if (other := contest.other) is None or contest.loaded is not None or contest.switched:
            return
        found, problem = None, ""
        try:
            found = await self.load(contest, other, low=True)
        except LmworksError as error:
            problem = error.found or error.what
        if (contest.other, contest.loaded, contest.switched) != (other, None, False):
            await self.retire(found, 0)  # an administrator has decided otherwise meanwhile
        else:
            contest.loaded, contest.problem, contest.seal = found, problem, "" if found is None else found.seal

    async def close(self) -> None:
        """End every engine of ours."""
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await asyncio.gather(*(engine.close() for engine in self.engines))

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something meanwhile."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    @property
    def standing(self) -> list[Model]:
        """What answers, or can at once."""
        found = [version for one in self.contests.values() for version in (one.own, one.current, one.loaded)]
        return [version.model for version in found if version is not None and not version.low]

    def current(self, model: Model) -> Model:
        """Return the version of a model that answers now."""
        contest = self.contests.get(model.spec.name)
        return model if contest is None else contest.current.model

    # -- what an administrator asks for: one thing at a time -----------------------------------------------------------

    async def keep(self, name: str, **now: Any) -> None:
        """Write down what is to be current. Raises Refused (507); then nothing may change."""
        models = {key: one.kept(**(now if key == name else {})) for key, one in self.contests.items()}
        try:
            await asyncio.to_thread(write_json, self.folder / STATE, {"format": FORMAT, "models": models})
        except OSError as error:
            raise Refused(507, f"{STATE} cannot be written: {error.strerror}", type="server_error") from None
        self.unwritten = ""

    async def keep_later(self) -> None:
        """Write down what is current once the disk takes it."""
        while self.unwritten:
            await asyncio.sleep(AGAIN)
            async with self.turn:
                if self.unwritten:
                    with suppress(Refused):
                        await self.keep("")

    async def challenge(self, name: str, folder: str, share: float) -> None:
        """Load a challenger and let it shadow the current version. Raises Refused; then all is as it was."""
        contest = self.contests[name]
        async with self.alone():
            if folder == contest.current.name:
                raise Refused(409, f"{folder} answers already", param="folder", code="already_current")
            version = await self.refused(self.load(contest, folder, low=True))
            try:
                await self.keep(name, other=folder, switched=False, share=share)
            except Refused:
                await self.retire(version, 0)
                raise
            self.spawn(self.retire(contest.loaded))
            contest.other, contest.loaded, contest.switched, contest.share = folder, version, False, share
            contest.tally, contest.problem, contest.seal = Tally(), "", version.seal

    async def exchange(self, name: str, *, back: bool) -> None:
        """Let the other version answer from now on. Raises Refused; then the current one goes on.

        The way back needs no disk: what cannot be written down is, later.
        """
        contest = self.contests[name]
        async with self.alone():
            if contest.other is None or contest.switched is not back:
                raise Refused(409, "there is nothing to go back to" if back else "there is no challenger to switch to",
                              code="nothing_to_switch")  # fmt: skip
            version = contest.loaded
            if fresh := version is None or version.low:
                version = await self.refused(self.load(contest, contest.other, low=False, seal=contest.seal))
            elif not version.engine.ready:
                raise Refused(503, version.engine.problem, code="not_ready", type="server_error")
            former = contest.current
            try:
                await self.keep(name, current=version.name, other=former.name, switched=not back)
            except Refused as refused:
                if not back:
                    if fresh:
                        await self.retire(version, 0)
                    raise
                if not self.unwritten:
                    self.spawn(self.keep_later())
                self.unwritten = f"{refused.message}: a restart goes on with what it says"
            if fresh:
                self.spawn(self.retire(contest.loaded))
            contest.current, contest.loaded, contest.other = version, former, former.name
            contest.switched, contest.problem, contest.seal = not back, "", former.seal
            self.watches.follow(name, version.monitor)

    async def stop(self, name: str) -> None:
        """Let go of the version that does not answer."""
        contest = self.contests[name]
        async with self.alone():
            await self.keep(name, other=None, switched=False)
            self.spawn(self.retire(contest.loaded))
            contest.other, contest.loaded, contest.switched, contest.problem, contest.seal = None, None, False, "", ""

    def alone(self) -> asyncio.Lock:
        """Return what keeps others out. Raises Refused (409) while something is under way."""
        if self.turn.locked():
            raise Refused(409, "another change is under way", code="busy")
        return self.turn

    async def refused(self, work: Coroutine[Any, Any, Version]) -> Version:
        """Return a version. Raises Refused for one that cannot be had."""
        try:
            return await work
        except LmworksError as error:
            raise Refused(400, refusal(error).message, param="folder", code="challenger_unusable") from None

    def state(self, name: str) -> dict[str, Any]:
        """Return what is told of a model."""
        one = self.contests[name]
        own = Path(one.own.model.spec.folder).name
        missing = "failed" if one.problem else "loading"
        doing = "none" if one.other is None else "switched" if one.switched else missing if one.loaded is None else (
            "shadow" if one.loaded.low else "standby")  # fmt: skip
        return {
            "state": doing, "current": one.current.name or own, "own": own,
            "other": own if one.other == OWN else one.other, "share": one.share,
            "problem": "; ".join(filter(None, (one.problem, self.unwritten))),
            "folders": names(self.folder), "shadow": one.tally.state(),
        }  # fmt: skip

    # -- the shadow ----------------------------------------------------------------------------------------------------

    def shadow(
        self, model: Model, examples: Sequence[Any], options: dict[str, Any], said: Sequence[Any], seconds: float
    ) -> None:
        """Ask the challenger what the champion has just answered, where it is the challenger's turn."""
        one = self.contests.get(model.spec.name)
        if one is None or one.loaded is None or not one.loaded.low or one.current.model is not model or not examples:
            return
        if random.random() >= one.share:
            return
        if len(one.current.engine.tickets) >= BUSY or len(one.loaded.engine.tickets) >= BACKLOG:
            self.counts.dropped(model.spec.name, one.tally, len(examples))
            return
        self.spawn(self.compare(one, one.loaded, examples, options, said, seconds))

    async def compare(
        self, one: Contest, version: Version, examples: Sequence[Any], options: dict[str, Any], said: Sequence[Any],
        seconds: float,
    ) -> None:  # fmt: skip
        """Let the challenger answer, and count what comes of it."""
        name, tally, began = version.model.spec.name, one.tally, time.perf_counter()
        asked = {key: value for key, value in options.items() if key != "check"}
        asked |= {} if version.monitor is None else {"check": True}
        payload = {"examples": list(examples), "options": asked}
        try:
            async with asyncio.timeout(PATIENCE):  # its engine may be let go of meanwhile
                found = await version.engine.get(version.model, "answer", payload)
        except (LmworksError, TimeoutError):
            self.counts.failed(name, tally, len(examples))
            return
        self.counts.compared(name, tally, [read(a) for a in said], [read(a) for a in found],
                             seconds, time.perf_counter() - began)  # fmt: skip
