"""The evaluation sets of a run as the dispatcher has them: their prompts, and how the groups of a version that is due are issued."""

from __future__ import annotations

from dataclasses import dataclass

from services.contracts.evaluation import Probe, set_spec
from services.contracts.messages import PromptGroup
from services.contracts.spec import EvaluationSet, RunSpec
from services.contracts.topics import evaluation_id
from services.control_plane.data import open_source
from services.control_plane.feeds import Feed
from services.runtime.bus import Bus
from services.runtime.evaluations import EvaluationLedger, Round, evaluated
from services.runtime.process import Shutdown
from services.runtime.tokenizer import PromptTokenizer


@dataclass(frozen=True)
class SetFeed:
    """The prompts of one evaluation set."""

    set: EvaluationSet
    feed: Feed
    """Under the set's own spec."""

    @property
    def count(self) -> int:
        """Prompts that are used."""
        return min(self.set.prompts, len(self.feed.source))

    def probe(self) -> Probe:
        """Raises DataError."""
        return Probe(name=self.set.name, domain=self.set.domain, prompts=[self.feed.prompt(n)[1] for n in range(self.count)])

    def group(self, run_id: str, index: int, *, of: Round) -> PromptGroup:
        """The group of a round at this index. Prompt and seeds depend on its place in the round alone: they are the same at every version."""
        group = self.feed.group(run_id, index - of.first, spec=self.feed.spec, version=of.version)
        return group.model_copy(update={"index": index})


def open_set(spec: RunSpec, one: EvaluationSet, tokenizer: PromptTokenizer) -> SetFeed:
    """Data equal to those of training are the same prompts, of which the set draws its own. Raises DataError, and ValueError for its sampling."""
    own = set_spec(spec, one)
    return SetFeed(one, Feed(own, open_source(own.data, seed=spec.seed), tokenizer))


def issue_due(bus: Bus, run_id: str, spec: RunSpec, sets: tuple[SetFeed, ...], *, version: int, shutdown: Shutdown) -> bool:
    """Issue what is due at `version`, which has been announced, and what a dispatcher before this one has left of it; True when all of it is.

    False when the run has ended, another control plane issues, or this one is to end: look again.
    """
    if not evaluated(bus, run_id, spec, version):
        return True
    for one in sets:
        child = evaluation_id(run_id, one.set.name)
        ledger = EvaluationLedger(bus, child)
        if not ledger.open(one.feed.spec):
            return False
        ledger.begin(version, count=one.count)
        issued = ledger.conservation().issued
        for round_ in ledger.rounds():
            for index in round_.indices[max(0, issued - round_.first) :]:
                if shutdown.asked or not ledger.issue(one.group(child, index, of=round_)):
                    return False
    return True
