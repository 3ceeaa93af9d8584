"""The rollout worker: turns prompts of one run, those of its evaluations first, into completions, and loads new weights between their tokens.

consumes    prompts of the run and of its evaluation sets, and entries that a dead server held
produces    completions
waits for   a claimed prompt; room in the engine; the current version
unblocked by the dispatcher; a group that ends; a weight load
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field

from rollout_server.engine import Engine, EngineDied, Sampled, SamplingRequest
from services.contracts.messages import Completion, CompletionGroup, LoadedWeights, LoadWeights, PromptGroup, pack_floats, pack_ints
from services.contracts.spec import RunSpec
from services.contracts.topics import RunKeys, Work, evaluation_id, run_of
from services.runtime.bus import Bus, Entry
from services.runtime.codec import Undecodable, decode
from services.runtime.ledger import Ledger, StartRefused
from services.runtime.metrics import RolloutMetrics
from services.runtime.process import IdleClock
from services.runtime.tokenizer import PromptTokenizer

log = logging.getLogger(__name__)

CLAIM_MS = 200
"""Longest wait for a prompt before looking at everything else again."""
TOUCH_SECONDS = 1.0
"""Between signs of life for the groups in hand."""
RECLAIM_MS = 5_000
"""A group whose server has given no sign of life for so long is another server's."""
DRAIN_SECONDS = 10.0
"""How long running groups may go on when the server is asked to end; then they are handed back."""


class NotServing(RuntimeError):
    """The request is for a run that this server does not serve."""


Key = tuple[str, str]
"""A group in hand: its stream and its entry there. An entry's id alone may be on two streams."""


@dataclass
class Running:
    """A group in hand."""

    entry: Entry
    task: asyncio.Task[None]
    sequences: int
    """That it takes of the engine: by the spec until the group has been read, since the knob `group_size` may have been turned."""
    request_ids: list[str] = field(default_factory=list)


class RolloutWorker:
    """Serves one run until it is told to stop."""

    def __init__(
        self, bus: Bus, run_id: str, spec: RunSpec, *, engine: Engine, tokenizer: PromptTokenizer, member: str, max_sequences: int,
        metrics: RolloutMetrics, idle: IdleClock,
    ) -> None:  # fmt: skip
        self.bus, self.run_id, self.spec, self.engine, self.tokenizer, self.member = bus, run_id, spec, engine, tokenizer, member
        self.samples = {run_id: spec.group_size} | {evaluation_id(run_id, one.name): one.samples for one in spec.evaluation.sets}
        """Completions of a group, by what is served: the run and its evaluation sets."""
        self._sets = tuple(served for served in self.samples if served != run_id)
        self.ledgers = {served: Ledger(bus, served) for served in self.samples}
        self.max_sequences, self.metrics, self.idle = max_sequences, metrics, idle
        self.version: int | None = None
        """The version of this run that the engine holds; None until one was loaded, and while the server is fenced."""
        self._running: dict[Key, Running] = {}
        self._loading = asyncio.Lock()
        self._changed = asyncio.Event()
        self._stop = asyncio.Event()
        self._dead: EngineDied | None = None

    async def serve(self) -> None:
        """Claim and complete groups until `stop`; then end or hand back what runs. Raises EngineDied: the process must be started again."""
        keeper = asyncio.create_task(self._keep())
        try:
            while not self._stop.is_set():
                if not self._running:
                    self.idle.begin()
                if self.version is None and not await self.join():
                    await asyncio.sleep(0.05)
                    continue
                room = self._room(self.run_id)
                if room < 1:
                    self._changed.clear()
                    await self._wait(self._changed, CLAIM_MS / 1000)
                    continue
                for entry in await self._claim(room):
                    self._begin(entry)
            await self._drain()
            if self._dead is not None:
                raise self._dead
        finally:
            self.idle.end()
            keeper.cancel()

    def stop(self) -> None:
        self._stop.set()
        self._changed.set()

    async def load(self, request: LoadWeights) -> LoadedWeights:
        """Load a version as the trainer asks. Raises NotServing, or the engine's WeightLoadFailed: then the old weights go on serving."""
        if request.run_id != self.run_id:
            raise NotServing(f"{self.member} serves run {self.run_id}, not {request.run_id}")
        async with self._loading:
            return await self._load(request)

    async def join(self) -> bool:
        """Load the newest published version from the store, if there is one newer than what is held; True when a version is held."""
        raw = await asyncio.to_thread(self.bus.call, lambda: self.bus.redis.get(RunKeys(self.run_id).weights))
        if raw is None:
            return False
        async with self._loading:
            try:
                request = decode(LoadWeights, raw)
                if self.version is None or request.version > self.version:
                    loaded = await self._load(request)
                    if not (difference := loaded.difference(request.expected)) <= request.tolerance:  # a NaN is no agreement
                        self.version = None
                        raise RuntimeError(f"the canary is {difference:.2g} nats off: these are not the weights that were published")
            except (OSError, RuntimeError, Undecodable) as error:
                log.warning("could not join from the store", extra={"error": str(error)})
                await asyncio.sleep(0.5)
        return self.version is not None

    async def fence(self) -> None:
        """Give up the weights and all groups in hand; what follows is a fresh join."""
        self.version = None
        await self._hand_back_all()

    async def _load(self, request: LoadWeights) -> LoadedWeights:
        try:
            loaded = await self.engine.load(request)
        except EngineDied as error:
            self._die(error)
            raise
        except Exception:
            self.metrics.loads.labels("failed").inc()
            raise
        self.version = request.version
        self.metrics.version.set(request.version)
        self.metrics.loads.labels("ok").inc()
        self.metrics.stall.observe(loaded.stall_seconds)
        return loaded

    async def _claim(self, room: int) -> list[Entry]:
        """Groups of the evaluation sets, for whose end the next version waits; while there are none, up to `room` of whatever comes first."""
        if self._sets:
            each = max(1, min(map(self._room, self._sets)) // len(self._sets))
            found = await asyncio.to_thread(self.bus.claim, self._sets, Work.PROMPTS, self.member, count=each, block_ms=None)
            if found:
                return found
        return await asyncio.to_thread(self.bus.claim, (*self._sets, self.run_id), Work.PROMPTS, self.member, count=room, block_ms=CLAIM_MS)

    def _begin(self, entry: Entry) -> None:
        self.idle.end()
        key = (entry.stream, entry.id)
        task = asyncio.create_task(self._complete(entry))
        self._running[key] = Running(entry, task, self.samples[run_of(entry.stream)])
        self.metrics.running.set(len(self._running))
        task.add_done_callback(lambda _: self._ended(key))

    def _ended(self, key: Key) -> None:
        self._running.pop(key, None)
        self.metrics.running.set(len(self._running))
        self._changed.set()

    async def _complete(self, entry: Entry) -> None:
        """One group, from its entry to its completions on the stream."""
        try:
            group = entry.message(PromptGroup)
        except Undecodable as error:
            await self._give_up(entry, str(error), None)
            return
        self._running[entry.stream, entry.id].sequences = group.group_size
        held = self.version
        if held is None:
            await self._hand_back(entry)
            return
        ledger = self._ledger(entry)
        attempt = await asyncio.to_thread(ledger.start, group.index, held=held, max_attempts=self.spec.max_attempts)
        if isinstance(attempt, StartRefused):
            await self._refused(entry, group, attempt, held)
            return
        started = time.time()
        self.metrics.wait.observe(max(0.0, started - group.issued_at))
        try:
            await self._sample_and_publish(entry, group, attempt, started)
        except EngineDied as error:
            self._die(error)
            await self._hand_back(entry)
        except Exception as error:  # one group's boundary: it is tried again, here or elsewhere, until its attempts are spent
            log.exception("a group failed", extra={"index": group.index, "attempt": attempt})
            self.metrics.groups.labels("failed").inc()
            if attempt >= self.spec.max_attempts:
                await self._give_up(entry, f"generation failed: {error}", group)
            else:
                await self._hand_back(entry)

    async def _sample_and_publish(self, entry: Entry, group: PromptGroup, attempt: int, started: float) -> None:
        requests = [
            SamplingRequest(
                request_id=f"{group.group_id}:{attempt}:{g}",
                prompt=group.prompt_ids,
                seed=group.seed + g,
                temperature=group.temperature,
                top_p=group.top_p,
                max_tokens=group.max_tokens,
            )
            for g in range(group.group_size)
        ]
        self._running[entry.stream, entry.id].request_ids = [r.request_id for r in requests]
        samples = [asyncio.create_task(self.engine.sample(request)) for request in requests]
        try:
            sampled = await asyncio.gather(*samples)
        finally:
            for sample in samples:
                sample.cancel()  # when one has failed, the others are in vain
        done = CompletionGroup(
            group=group, completions=tuple(self._completion(s) for s in sampled), server=self.member, attempt=attempt, started_at=started
        )
        accepted = await asyncio.to_thread(self._ledger(entry).finish, entry, done)
        self.metrics.groups.labels("published" if accepted else "superseded").inc()
        self.metrics.tokens.inc(sum(len(s.tokens) for s in sampled))
        self.metrics.generation.observe(time.time() - started)

    def _completion(self, sampled: Sampled) -> Completion:
        return Completion(
            tokens=pack_ints(sampled.tokens),
            logprobs=pack_floats(sampled.logprobs),
            spans=sampled.spans,
            text=self.tokenizer.decode(sampled.tokens),
            finish=sampled.finish,
        )

    async def _refused(self, entry: Entry, group: PromptGroup, why: StartRefused, held: int) -> None:
        match why:
            case StartRefused.GONE | StartRefused.DONE:
                await asyncio.to_thread(self.bus.acknowledge, run_of(entry.stream), Work.PROMPTS, [entry.id])
            case StartRefused.SPENT:
                await self._give_up(entry, f"given up after {self.spec.max_attempts} attempts, the last of which never ended", group)
            case StartRefused.STALE if run_of(entry.stream) in self._sets and held > group.issued_version:
                await self._give_up(entry, f"version {group.issued_version}, which it was to evaluate, has passed: version {held} is held", group)
            case StartRefused.STALE:
                log.warning("holds a version that is not current", extra={"held": held})
                await self._hand_back(entry)
                if self.version == held:  # nothing may be claimed until another version is loaded, from the store or by the trainer
                    self.version = None

    async def _give_up(self, entry: Entry, reason: str, group: PromptGroup | None) -> None:
        log.error("dead-lettered", extra={"entry": entry.id, "reason": reason})
        if await asyncio.to_thread(self._ledger(entry).give_up, entry, Work.PROMPTS, reason, group=group):
            self.metrics.dead_letters.labels(Work.PROMPTS.value).inc()

    async def _hand_back(self, entry: Entry) -> None:
        await asyncio.to_thread(self.bus.hand_back, run_of(entry.stream), Work.PROMPTS, self.member, [entry.id])

    def _ledger(self, entry: Entry) -> Ledger:
        """Of the run or the evaluation set that the entry is of."""
        return self.ledgers[run_of(entry.stream)]

    async def _keep(self) -> None:
        """Signs of life for what is in hand, and a look for what the dead left behind."""
        while True:
            await asyncio.sleep(TOUCH_SECONDS)
            for served in (*self._sets, self.run_id):
                held = [entry_id for stream, entry_id in self._running if run_of(stream) == served]
                await asyncio.to_thread(self.bus.touch, served, Work.PROMPTS, self.member, held)
                room = max(int(served in self._sets), self._room(served))  # training's prompts may fill every place for long
                if self.version is None or room < 1 or self._stop.is_set():
                    continue
                for entry in await asyncio.to_thread(self.bus.reclaim, served, Work.PROMPTS, self.member, idle_ms=RECLAIM_MS, count=room):
                    if (entry.stream, entry.id) not in self._running:
                        self._begin(entry)

    def _room(self, served: str) -> int:
        """Groups of the run, or of an evaluation set, that may be claimed now: at least one when none is in hand, however large it is."""
        free = self.max_sequences - sum(running.sequences for running in self._running.values())
        return max(0 if self._running else 1, free // self.samples[served])

    def _die(self, error: EngineDied) -> None:
        """The groups are not at fault: others take them over, and this process ends."""
        log.error("the engine died", extra={"error": str(error)})
        self._dead, self.version = error, None
        self.stop()

    async def _drain(self) -> None:
        tasks = [running.task for running in self._running.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=DRAIN_SECONDS)
        await self._hand_back_all()

    async def _hand_back_all(self) -> None:
        left = list(self._running.values())
        for running in left:
            running.task.cancel()
        if self._dead is None:
            await self.engine.abort([r for running in left for r in running.request_ids])
        await asyncio.gather(*(running.task for running in left), return_exceptions=True)
        for served in self.samples:
            entry_ids = [running.entry.id for running in left if run_of(running.entry.stream) == served]
            await asyncio.to_thread(self.bus.hand_back, served, Work.PROMPTS, self.member, entry_ids)

    @staticmethod
    async def _wait(event: asyncio.Event, seconds: float) -> None:
        try:
            await asyncio.wait_for(event.wait(), seconds)
        except TimeoutError:
            return
