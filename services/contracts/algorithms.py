"""The algorithm of a run, as its spec says it: advantages, reward shaping, policy loss, off-policy correction, entropy control, staleness control.

A part with variants is a union told apart by its tag (`advantage.estimator`, `loss.kind`, `entropy.method`): each variant has the fields that
it reads and its own defaults, and a field of another variant is refused. The formulas are in the modules of the trainer that read these sections.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, model_validator

from services.contracts.section import Section

# -- advantages --------------------------------------------------------------------------------------------------------------------------------


class Grpo(Section):
    """GRPO (arXiv 2402.03300): the group's mean reward subtracted, divided by the group's standard deviation."""

    estimator: Literal["grpo"] = "grpo"
    """Which estimator this is."""
    normalise: Literal["std", "none"] = "std"
    """`std`: divided by the group's standard deviation; `none`: mean subtracted only."""
    epsilon: float = Field(1e-4, gt=0)
    """Added to the standard deviation."""


class DrGrpo(Section):
    """Dr. GRPO (arXiv 2503.20783): mean subtracted only; made whole by `loss.normaliser = "constant"`."""

    estimator: Literal["dr_grpo"] = "dr_grpo"
    """Which estimator this is."""


class Rloo(Section):
    """RLOO (arXiv 2402.14740): the mean of the group's other rewards subtracted."""

    estimator: Literal["rloo"] = "rloo"
    """Which estimator this is."""


class ReinforcePlusPlus(Section):
    """REINFORCE++ with a group baseline (arXiv 2501.03262): group mean subtracted, then whitened over the batch."""

    estimator: Literal["reinforce_pp"] = "reinforce_pp"
    """Which estimator this is."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the batch's standard deviation."""


class Psr(Section):
    """Positive sample reinforcement (arXiv 2506.01347): 1 for a correct completion, 0 for a wrong one."""

    estimator: Literal["psr"] = "psr"
    """Which estimator this is."""


class Nsr(Section):
    """Negative sample reinforcement (arXiv 2506.01347): 0 for a correct completion, -1 for a wrong one."""

    estimator: Literal["nsr"] = "nsr"
    """Which estimator this is."""


class WReinforce(Section):
    """W-REINFORCE (arXiv 2506.01347): `weight` for a correct completion, -1 for a wrong one."""

    estimator: Literal["w_reinforce"] = "w_reinforce"
    """Which estimator this is."""
    weight: float = Field(0.1, ge=0, le=10)
    """Advantage of a correct completion. *Knob.*"""


class QuantileBaseline(Section):
    """Quantile advantage (arXiv 2509.22611): the group's K-quantile of rewards as its baseline."""

    estimator: Literal["quantile"] = "quantile"
    """Which estimator this is."""
    quantile: float = Field(0.4, gt=0, lt=1)
    """K: groups with a share of correct completions up to 1 - K reinforce success, the others punish failure."""
    epsilon: float = Field(1e-4, gt=0)
    """Added to the standard deviation."""


class PassAtK(Section):
    """Pass@k training with analytic advantages (arXiv 2508.10751): the group's reward is the chance that one of k drawn completions is correct."""

    estimator: Literal["pass_at_k"] = "pass_at_k"
    """Which estimator this is."""
    k: int = Field(4, ge=1)
    """Completions drawn; at most `group_size`."""


Advantage = Annotated[
    Grpo | DrGrpo | Rloo | ReinforcePlusPlus | Psr | Nsr | WReinforce | QuantileBaseline | PassAtK, Field(discriminator="estimator")
]


class Shaping(Section):
    """What is done to rewards and groups before they become advantages."""

    correct_at: float = Field(1.0)
    """Reward from which a completion counts as correct: for estimators and measures that need right and wrong."""
    skip_zero_signal: bool = False
    """Dynamic sampling (DAPO, arXiv 2503.14476): groups whose rewards are all equal are skipped, counted, and replaced by new ones."""
    skip_limit: int = Field(10, ge=1)
    """Batches' worth of groups that may be skipped for one version; past it they are trained on as they are."""
    overlong_buffer: int = Field(0, ge=0)
    """Soft overlong punishment (DAPO): over the last so many tokens before `sampling.max_tokens` the reward falls; 0 is off."""
    overlong_penalty: float = Field(1.0, ge=0)
    """What a completion of the greatest length loses."""
    mask_truncated: bool = False
    """Completions that were cut off at the greatest length are not trained on."""
    unlikeliness: float = Field(0.0, ge=0, le=1)
    """beta_rank of the unlikeliness reward (arXiv 2506.02355): likely correct completions lose up to this share of their reward; 0 is off."""


# -- losses ------------------------------------------------------------------------------------------------------------------------------------


class Normaliser(StrEnum):
    """What the sum over a mini-batch's tokens is divided by."""

    TOKEN = "token"
    """Its trained tokens: every token weighs the same (DAPO)."""
    SEQUENCE = "sequence"
    """Mean over tokens within each completion, then over completions: every completion weighs the same (GRPO)."""
    CONSTANT = "constant"
    """Completions times `sampling.max_tokens`: no weight depends on a length (Dr. GRPO)."""


class _Loss(Section):
    normaliser: Normaliser = Normaliser.TOKEN
    """What the sum over a mini-batch's tokens is divided by."""


class ClippedSurrogate(_Loss):
    """PPO's clipped surrogate (arXiv 1707.06347), its bounds those of `clip`."""

    kind: Literal["clip"] = "clip"
    """Which loss this is."""
    dual_clip: float | None = Field(None, gt=1)
    """c of dual-clip PPO (arXiv 1912.09729): for A < 0 the objective is at least c A; 3 is customary. None: off."""


class Cispo(_Loss):
    """CISPO (arXiv 2506.13585): the clipped ratio as a constant weight of log pi, so that no token loses its gradient."""

    kind: Literal["cispo"] = "cispo"
    """Which loss this is."""
    low: float = Field(1.0, ge=0, le=1)
    """Lower bound of the weight is 1 - low; 1: no lower bound."""
    high: float = Field(4.0, ge=0, le=100)
    """Upper bound of the weight is 1 + high."""


class Gspo(_Loss):
    """GSPO (arXiv 2507.18071): one ratio for the completion, the geometric mean of its tokens', clipped as a whole."""

    kind: Literal["gspo"] = "gspo"
    """Which loss this is."""
    normaliser: Normaliser = Normaliser.SEQUENCE
    """What the sum over a mini-batch's tokens is divided by."""
    low: float = Field(3e-4, ge=0, le=1)
    """The ratio's lower bound is 1 - low."""
    high: float = Field(4e-4, ge=0, le=100)
    """The ratio's upper bound is 1 + high."""


class Sapo(_Loss):
    """SAPO (arXiv 2511.20347): a smooth gate in place of the clip."""

    kind: Literal["sapo"] = "sapo"
    """Which loss this is."""
    tau_positive: float = Field(1.0, gt=0)
    """Temperature of the gate of tokens with positive advantage."""
    tau_negative: float = Field(1.05, gt=0)
    """Temperature of the gate of the other tokens."""


class Dppo(_Loss):
    """DPPO (arXiv 2602.04879), binary total variation: tokens whose probability, not ratio, has moved too far are masked."""

    kind: Literal["dppo"] = "dppo"
    """Which loss this is."""
    low: float = Field(0.15, ge=0, le=1)
    """A token of negative advantage is masked once its probability has fallen by more."""
    high: float = Field(0.15, ge=0, le=1)
    """A token of positive advantage is masked once its probability has risen by more."""
    truncation: float = Field(20.0, gt=1)
    """Upper bound of the ratio as the weight of a token."""
    penalty: float = Field(0.0, ge=0)
    """Weight of a penalty on the squared log-ratio; not the paper's: prime-rl had 1e-3, with bounds of 0.2."""


class Topr(_Loss):
    """TOPR (arXiv 2503.14286): correct completions without importance ratio, wrong ones with the ratio cut at 1."""

    kind: Literal["topr"] = "topr"
    """Which loss this is."""
    level: Literal["token", "completion"] = "token"
    """`token`: each token's own ratio, as ROLL and Trinity-RFT have it; `completion`: the product over its tokens, as the paper has it."""


class Aspo(_Loss):
    """ASPO (arXiv 2510.06062): the ratio of positive tokens is turned upside down, so that unlikely ones are pushed more; bounds of `clip`."""

    kind: Literal["aspo"] = "aspo"
    """Which loss this is."""
    dual_clip: float = Field(3.0, gt=1)
    """Upper bound of the weight of a token, in both signs."""


Loss = Annotated[ClippedSurrogate | Cispo | Gspo | Sapo | Dppo | Topr | Aspo, Field(discriminator="kind")]


class Clip(Section):
    low: float = Field(0.2, ge=0, le=1)
    """The ratio's lower bound is 1 - low. *Knob.*"""
    high: float = Field(0.2, ge=0, le=100)
    """The ratio's upper bound is 1 + high. *Knob.*"""
    off: bool = False
    """No clipping at all, in the losses `clip`, `gspo` and `aspo`; a dual clip stays. *Knob.*"""


# -- off-policy correction ---------------------------------------------------------------------------------------------------------------------


class Anchor(StrEnum):
    """The policy in the denominator of the importance ratio."""

    BEHAVIOUR = "behaviour"
    """The sampler's own log-probabilities: lag is visible to the clip."""
    PROXIMAL = "proximal"
    """The policy at the start of the step: lag is invisible to the loss."""
    DECOUPLED = "decoupled"
    """The proximal policy in the clipped ratio, times the weight proximal/behaviour as `correction.weight` says (decoupled PPO)."""


class Weighting(StrEnum):
    """What becomes of the weight w = proximal/behaviour, of the token, of its completion (product) or of its completion's geometric mean."""

    NONE = "none"
    """w as it is (decoupled); no token rejected."""
    TRUNCATE = "truncate"
    """min(w, truncation): TIS."""
    MASK = "mask"
    """w inside [reject_below, reject_above], 0 outside: masked importance sampling, IcePop (its bounds: 0.5 and 5)."""
    SEQUENCE_TRUNCATE = "sequence_truncate"
    """The completion's product of w, truncated."""
    SEQUENCE_MASK = "sequence_mask"
    """The completion's product of w inside the bounds, 0 outside."""
    GEOMETRIC_MASK = "geometric_mask"
    """w, and 0 for all tokens of a completion whose geometric mean is outside the bounds."""


class Correction(Section):
    anchor: Anchor = Anchor.BEHAVIOUR
    """The policy in the denominator of the importance ratio."""
    weight: Weighting | None = None
    """What becomes of the weight proximal/behaviour; default: `truncate` under the anchor `decoupled`, else `none`. With another anchor than
    `decoupled` there is no weight but its rejections: tokens are kept or not, and truncation is refused."""
    truncation: float = Field(2.0, gt=0)
    """Upper bound of a truncated weight."""
    reject_below: float = Field(0.5, ge=0)
    """Least weight that is not rejected."""
    reject_above: float = Field(2.0, gt=0)
    """Greatest weight that is not rejected."""
    m2: float | None = Field(None, gt=0)
    """M2PO (arXiv 2510.01161): tokens with the largest squared log-ratio are masked until its mean is at most this, such as 0.04. None: off."""
    opsm: float | None = Field(None, gt=0)
    """Off-policy sequence masking (DeepSeek-V3.2): a completion with A < 0 and mean log(behaviour/current) above this, such as 0.5, is dropped.
    None: off."""

    @property
    def weighting(self) -> Weighting:
        if self.weight is not None:
            return self.weight
        return Weighting.TRUNCATE if self.anchor is Anchor.DECOUPLED else Weighting.NONE

    @model_validator(mode="after")
    def _bounds(self) -> Correction:
        if self.anchor is not Anchor.DECOUPLED and self.weight in (Weighting.TRUNCATE, Weighting.SEQUENCE_TRUNCATE):
            under = f"under {self.anchor.value!r} there is no weight to truncate"
            raise ValueError(f"correction.weight {self.weight.value!r} needs correction.anchor 'decoupled': {under}")
        if self.reject_below >= self.reject_above:
            raise ValueError(f"correction.reject_below ({self.reject_below}) is not below correction.reject_above ({self.reject_above})")
        return self


# -- entropy control ---------------------------------------------------------------------------------------------------------------------------


class NoControl(Section):
    """Entropy is measured and left alone."""

    method: Literal["none"] = "none"
    """Which method this is."""


class PositiveReweighting(Section):
    """Positive (v1: Progressive) Advantage Reweighting (arXiv 2511.05993): the loss of tokens with positive advantage is multiplied by lambda.

    The paper's own setting, `start = 0, floor = 0, guard = false`, can latch up: with negatives only the policy degrades and its entropy falls.
    """

    method: Literal["positive_reweighting"] = "positive_reweighting"
    """Which method this is."""
    schedule: Literal["entropy", "stage", "epoch", "constant"] = "entropy"
    """`entropy`: lambda falls by `step` while entropy is below `target`, rises otherwise; `stage`: 0 in the first half of the run, then 0 to 1;
    `epoch`: (e - 1) / (E - 1) in epoch e of E; `constant`: `start`."""
    target: float = Field(0.2, ge=0)
    """Entropy to be held, in nats; read by the schedule `entropy`. *Knob.*"""
    step: float = Field(0.05, gt=0, le=1)
    """Change of lambda in one version. *Knob.*"""
    lag_scaled: bool = True
    """Divide `step` by 1 + the age of the measured entropy in versions, so that stale feedback does not make lambda swing."""
    start: float = Field(1.0, ge=0, le=1)
    """lambda before the first version; read by the schedules `entropy` and `constant`."""
    floor: float = Field(0.2, ge=0, le=1)
    """Least lambda, in every schedule. *Knob.*"""
    includes_zero: bool = False
    """lambda weighs tokens with A >= 0 (v1 of the paper) in place of A > 0."""
    guard: bool = True
    """While the smoothed reward is more than `guard_drop` below its best, lambda rises whatever the entropy is; read by the schedule `entropy`."""
    guard_drop: float = Field(0.2, gt=0)
    """Fall of the reward that wakes the guard, as a share of its best; it sleeps again at half of it. At 0.1 the noise of 128 completions
    wakes it."""


class AdaptiveRegularisation(Section):
    """Adaptive entropy regularisation (Skywork-OR1, arXiv 2505.22312): an entropy bonus whose coefficient follows the target."""

    method: Literal["adaptive_regularisation"] = "adaptive_regularisation"
    """Which method this is."""
    target: float = Field(0.2, ge=0)
    """Entropy to be held, in nats. *Knob.*"""
    step: float = Field(1e-4, gt=0)
    """Change of the coefficient in one version. *Knob.*"""
    start: float = Field(0.0, ge=0)
    """Coefficient before the first version."""
    greatest: float = Field(5e-3, gt=0)
    """Greatest coefficient. *Knob.*"""


class Bonus(Section):
    """A static entropy bonus."""

    method: Literal["bonus"] = "bonus"
    """Which method this is."""
    coefficient: float = Field(1e-3, ge=0)
    """Weight of the mean entropy in the objective. Too high, and entropy explodes. *Knob.*"""


class ClipCov(Section):
    """Clip-Cov (arXiv 2505.22617): a few random tokens of high covariance between log-probability and advantage get no gradient."""

    method: Literal["clip_cov"] = "clip_cov"
    """Which method this is."""
    fraction: float = Field(2e-4, gt=0, le=1)
    """Share of the tokens that are chosen. *Knob.*"""
    low: float = 1.0
    """Least covariance of a candidate."""
    high: float = 5.0
    """Greatest covariance of a candidate."""

    @model_validator(mode="after")
    def _band(self) -> ClipCov:
        if self.low >= self.high:
            raise ValueError(f"entropy.low ({self.low}) is not below entropy.high ({self.high}): no token would be a candidate")
        return self


class KlCov(Section):
    """KL-Cov (arXiv 2505.22617): the tokens of the highest covariance get a penalty on their log-ratio; no clip."""

    method: Literal["kl_cov"] = "kl_cov"
    """Which method this is."""
    fraction: float = Field(2e-4, gt=0, le=1)
    """Share of the tokens that are chosen. *Knob.*"""
    coefficient: float = Field(1.0, ge=0)
    """Weight of the penalty. *Knob.*"""


class EntropyAdvantage(Section):
    """Entropy-shaped advantages (arXiv 2506.14758): A + min(coefficient H, |A| / kappa)."""

    method: Literal["entropy_advantage"] = "entropy_advantage"
    """Which method this is."""
    coefficient: float = Field(0.4, ge=0)
    """Weight of the token's entropy. *Knob.*"""
    kappa: float = Field(2.0, gt=1)
    """The shaping is at most |A| / kappa, so that no sign turns."""


class ForkingTokens(Section):
    """80/20 (arXiv 2506.01939): only the tokens of highest entropy are trained on."""

    method: Literal["forking_tokens"] = "forking_tokens"
    """Which method this is."""
    fraction: float = Field(0.2, gt=0, le=1)
    """Share of the tokens that are trained on. *Knob.*"""


class RandomPositiveClip(Section):
    """A random share of the tokens of positive advantage gets no gradient: the control of the covariance methods (arXiv 2511.05993)."""

    method: Literal["random_positive_clip"] = "random_positive_clip"
    """Which method this is."""
    fraction: float = Field(0.1, gt=0, le=1)
    """Share of the tokens of positive advantage. *Knob.*"""


class OneSign(Section):
    """Only tokens of one sign of the advantage are trained on (arXiv 2511.05993)."""

    method: Literal["one_sign"] = "one_sign"
    """Which method this is."""
    sign: Literal["positive", "negative"] = "positive"
    """`positive`: A >= 0 only; `negative`: A <= 0 only. *Knob.*"""


class EntroPic(Section):
    """EntroPIC (arXiv 2511.15248): a PI controller weighs high-probability tokens of positive and negative advantage against each other."""

    method: Literal["entropic"] = "entropic"
    """Which method this is."""
    target: float = Field(0.1, ge=0)
    """Entropy to be held, in nats. *Knob.*"""
    proportional: float = Field(1.0, ge=0)
    """Kp. *Knob.*"""
    integral: float = Field(0.01, ge=0)
    """Ki. *Knob.*"""
    threshold: float = Field(0.95, ge=0, lt=1)
    """Probability above which a token counts as of high probability."""


class Bapo(Section):
    """BAPO (arXiv 2510.18927): the clip's bounds are widened, batch by batch, until tokens of positive advantage have their share of the loss."""

    method: Literal["bapo"] = "bapo"
    """Which method this is."""
    positive_share: float = Field(0.4, gt=0, lt=1)
    """Least share of the loss that tokens of positive advantage are to have: 0.4 in the paper, 0.5 in its repository. *Knob.*"""
    low_least: float = Field(0.6, gt=0, le=1)
    """Lower bound of the ratio where the search starts; it ends at `low_greatest`."""
    low_greatest: float = Field(0.9, gt=0, le=1)
    """Greatest lower bound of the ratio."""
    high_least: float = Field(1.2, ge=1)
    """Upper bound of the ratio where the search starts; it ends at `high_greatest`."""
    high_greatest: float = Field(3.0, ge=1)
    """Greatest upper bound of the ratio."""
    step_high: float = Field(0.05, gt=0)
    """Step of the upper bound."""
    step_low: float = Field(0.02, gt=0)
    """Step of the lower bound."""

    @model_validator(mode="after")
    def _ranges(self) -> Bapo:
        for bound in ("low", "high"):
            least, greatest = getattr(self, f"{bound}_least"), getattr(self, f"{bound}_greatest")
            if least > greatest:
                raise ValueError(f"entropy.{bound}_least ({least}) is above entropy.{bound}_greatest ({greatest})")
        return self


EntropyControl = Annotated[
    NoControl | PositiveReweighting | AdaptiveRegularisation | Bonus | ClipCov | KlCov | EntropyAdvantage | ForkingTokens | RandomPositiveClip
    | OneSign | EntroPic | Bapo,
    Field(discriminator="method"),
]  # fmt: skip


# -- staleness control -------------------------------------------------------------------------------------------------------------------------


class StalenessTarget(Section):
    """Closed loop: `staleness.max_lag` is turned, within bounds, until a measure of off-policyness is at its target."""

    metric: Literal["kl", "ess", "entropy_slope"] = "kl"
    """`kl`: KL of the sampler to the current policy (k3), nats; `ess`: effective sample size, a share; `entropy_slope`: nats a version, taken to rise
    with lag, as it does where the clip is anchored on the behaviour policy."""
    value: float
    """Where the measure is to be. *Knob.*"""
    least: int = Field(0, ge=0, le=1024)
    """Least max_lag."""
    greatest: int = Field(16, ge=1, le=1024)
    """Greatest max_lag."""
    exact: bool = False
    """min_lag follows max_lag. Without it the lag is what the fleet makes of max_lag: less, where rollout servers are the bottleneck."""
    band: float = Field(0.1, gt=0, lt=1)
    """Relative distance from the target within which nothing is turned; of `ess`, a share of the target's distance from 1."""

    @model_validator(mode="after")
    def _possible(self) -> StalenessTarget:
        if self.least >= self.greatest:
            raise ValueError(f"staleness.target.least ({self.least}) is not below staleness.target.greatest ({self.greatest})")
        if self.metric == "kl" and self.value <= 0:
            raise ValueError("staleness.target.value: a KL divergence to be held must be above 0")
        if self.metric == "ess" and not 0 < self.value < 1:
            raise ValueError("staleness.target.value: an effective sample size to be held must lie between 0 and 1")
        return self


TAGS: dict[str, str] = {"advantage": "estimator", "loss": "kind", "entropy": "method"}
"""Sections with variants and the field that tells them apart. A change of that field starts the section anew, from its variant's defaults."""
