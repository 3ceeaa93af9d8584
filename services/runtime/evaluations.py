"""The evaluations of a run in the store: what the control plane issues and records, and what the trainer waits for. Every move is one script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.contracts.evaluation import Probe, Probes, due
from services.contracts.messages import EvaluationRecord
from services.contracts.spec import RunSpec
from services.contracts.topics import ACTIVE, GROUPS, RETENTION, Log, RunKeys, Work, evaluation_id, parent_of
from services.runtime.bus import Bus, Entry
from services.runtime.codec import decode, encode
from services.runtime.ledger import Ledger

__all__ = ["EvaluationLedger", "Evaluations", "Probe", "Round", "evaluated", "probes", "store_probes"]


class Evaluations:
    """What a run's trainer asks before it loads a version and before it ends. Each question is one call to Redis, and none at a version not due."""

    def __init__(self, bus: Bus, run_id: str, spec: RunSpec) -> None:
        self.bus, self.spec, self._keys = bus, spec, RunKeys(run_id)
        self._sets = [RunKeys(evaluation_id(run_id, one.name)) for one in spec.evaluation.sets]

    def pass_over(self, version: int) -> None:
        """`version` is not evaluated. To be said before it is announced, from when on its groups are issued."""
        self.bus.call(lambda: self.bus.redis.sadd(self._keys.passed_over, version))

    def may_load(self, version: int) -> bool:
        """May servers load another version than `version`, which is announced? When all that is due at it has been generated, or given up."""
        if not due(self.spec, version):
            return True
        sets = [key for keys in self._sets for key in (keys.info, keys.ledger)]
        return bool(self.bus.script(_GENERATED, [self._keys.passed_over, *sets], [version]))

    def recorded(self, version: int) -> bool:
        """Are the records of all sets that are due at `version` there?"""
        return not due(self.spec, version) or bool(self.bus.script(_RECORDED, [keys.info for keys in self._sets], [version]))


def evaluated(bus: Bus, run_id: str, spec: RunSpec, version: int) -> bool:
    """Is the run evaluated at `version`? When it is due, and was not passed over."""
    return due(spec, version) and not bus.call(lambda: bus.redis.sismember(RunKeys(run_id).passed_over, str(version)))


def probes(bus: Bus, run_id: str) -> list[Probe]:
    """The prompts of the run's evaluation sets. They are there before its first group is; none until then, or without sets."""
    raw = bus.call(lambda: bus.redis.get(RunKeys(run_id).probes))
    return [] if raw is None else list(decode(Probes, raw).probes)


def store_probes(bus: Bus, run_id: str, found: Sequence[Probe]) -> None:
    payload = encode(Probes(probes=tuple(found)))
    bus.call(lambda: bus.redis.set(RunKeys(run_id).probes, payload))


@dataclass(frozen=True)
class Round:
    """The groups that are issued for the evaluation of one version: those with the indices [first, first + count)."""

    version: int
    first: int
    count: int

    @property
    def indices(self) -> range:
        return range(self.first, self.first + self.count)


class EvaluationLedger(Ledger):
    """The ledger of an evaluation set, whose groups are issued in rounds: one for each version that is evaluated, once whoever dies in between.

    Its `version` is that of the newest round. A round is over when its record is made, with which its groups are consumed.
    """

    def __init__(self, bus: Bus, run_id: str) -> None:
        super().__init__(bus, run_id)
        parent = parent_of(run_id)
        assert parent is not None, f"{run_id} is no evaluation set"
        self.parent = RunKeys(parent)

    def open(self, spec: RunSpec) -> bool:
        """Let servers work on the set; harmless when they do. False if the run has ended: then nothing may be begun that nobody would close."""
        streams = [self.keys.stream(topic) for topic in GROUPS]
        return bool(
            self.bus.script(_OPEN, [self.parent.info, self.keys.info, ACTIVE, *streams], [self.run_id, spec.model_dump_json(), *GROUPS.values()])
        )

    def begin(self, version: int, *, count: int) -> None:
        """Have `count` groups issued for `version`, unless it is older than the newest round, or of it."""
        self.bus.script(_BEGIN, [self.keys.info, self.keys.plan], [version, count])

    def rounds(self) -> list[Round]:
        """Those that are not recorded yet, oldest first."""
        rows = self.bus.call(lambda: self.bus.redis.hgetall(self.keys.plan))
        return sorted((Round(int(version), *map(int, raw.split(b":"))) for version, raw in rows.items()), key=lambda one: one.version)

    def record(self, done: Round, record: EvaluationRecord, entries: Sequence[Entry]) -> bool:
        """Record what the round came to and consume its groups, which these entries hold; False if that was done before, or the run has ended."""
        return bool(
            self.bus.script(
                _RECORD,
                [
                    self.keys.info, self.keys.ledger, self.keys.plan, self.keys.stream(Work.SCORED),
                    self.parent.stream(Log.EVALUATIONS), self.parent.seq(Log.EVALUATIONS),
                ],
                [done.version, encode(record), RETENTION[Log.EVALUATIONS], GROUPS[Work.SCORED], *(entry.id for entry in entries)],
            )
        )  # fmt: skip

    def end(self) -> None:
        """The run has ended: nothing more is issued, what is outstanding is cancelled, and servers forget the set."""
        self.bus.call(lambda: self.bus.redis.hset(self.keys.info, "state", "cancelled"))
        self.close()
        self.bus.call(lambda: self.bus.redis.srem(ACTIVE, self.run_id))


_OPEN = """
local state = redis.call('HGET', KEYS[1], 'state')
if not state or state == 'cancelled' or state == 'completed' then return 0 end
redis.call('HSETNX', KEYS[2], 'spec', ARGV[2])
redis.call('HSETNX', KEYS[2], 'state', 'running')
for i = 4, #KEYS do
  local made = redis.pcall('XGROUP', 'CREATE', KEYS[i], ARGV[i - 1], '0', 'MKSTREAM')
  if made.err and not string.find(made.err, 'BUSYGROUP', 1, true) then return made end
end
redis.call('SADD', KEYS[3], ARGV[1])
return 1
"""

_BEGIN = """
local state = redis.call('HGET', KEYS[1], 'state')
if state ~= 'running' then return 0 end
local newest = redis.call('HGET', KEYS[1], 'version')
if newest and tonumber(newest) >= tonumber(ARGV[1]) then return 0 end
local first = tonumber(redis.call('HGET', KEYS[1], 'goal') or '0')
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'goal', first + tonumber(ARGV[2]))
redis.call('HSET', KEYS[2], ARGV[1], first .. ':' .. ARGV[2])
return 1
"""

_GENERATED = """
if redis.call('SISMEMBER', KEYS[1], ARGV[1]) == 1 then return 1 end
for i = 2, #KEYS, 2 do
  local version, goal, issued = unpack(redis.call('HMGET', KEYS[i], 'version', 'goal', 'issued'))
  if not version or tonumber(version) < tonumber(ARGV[1]) or tonumber(issued or '0') < tonumber(goal) then return 0 end
  for _, row in ipairs(redis.call('HVALS', KEYS[i + 1])) do
    local place = string.sub(row, 1, 1)
    if place == 'q' or place == 'r' then return 0 end
  end
end
return 1
"""

_RECORDED = """
for i = 1, #KEYS do
  local newest = redis.call('HGET', KEYS[i], 'recorded')
  if not newest or tonumber(newest) < tonumber(ARGV[1]) then return 0 end
end
return 1
"""

_RECORD = """
local round = redis.call('HGET', KEYS[3], ARGV[1])
if not round then return 0 end
local first, count = string.match(round, '(%d+):(%d+)')
local consumed = 0
for index = tonumber(first), tonumber(first) + tonumber(count) - 1 do consumed = consumed + redis.call('HDEL', KEYS[2], index) end
redis.call('HINCRBY', KEYS[1], 'consumed', consumed)
redis.call('HSET', KEYS[1], 'recorded', ARGV[1])
redis.call('HDEL', KEYS[3], ARGV[1])
for i = 5, #ARGV do
  redis.call('XACK', KEYS[4], ARGV[4], ARGV[i])
  redis.call('XDEL', KEYS[4], ARGV[i])
end
redis.call('XADD', KEYS[5], 'MAXLEN', '~', ARGV[3], '*', 'seq', redis.call('INCR', KEYS[6]), 'data', ARGV[2])
return 1
"""
