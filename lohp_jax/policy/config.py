"""Settings of the hybrid-policy objective, and those of the paper."""

import dataclasses
from typing import Literal, get_args

from lohp_jax.checks import check_option

Reward = Literal["matched", "end"]
Backward = Literal["bridge", "learned"]
Sees = Literal["gradient", "loss"]
Objective = Literal["balance", "likelihood", "task_loss"]


@dataclasses.dataclass(frozen=True)
class HybridConfig:
    """The objective. Widths are in units of the standardised weights."""

    reward: Reward = "matched"
    """"matched": R_m at both ends of a sub-trajectory; "end": as published, R_n at both."""
    backward: Backward = "bridge"
    """P_B: the bridge of the tube, or the network's backward head (as published)."""
    per_dimension: bool = True
    """One residual per weight; False sums them over the weights, as published."""
    start_std: float = 0.1
    """Width of the prior over starts and of the tube at step 0."""
    end_std: float = 0.1
    """Width of the tube at step N."""
    correlation: float = 0.5
    """Correlation of neighbouring states in the tube, in [0, 1)."""
    log_std_range: float = 0.3
    """The policy's log standard deviation stays within this of the bridge's."""
    perturb: bool = True
    """Draw the off-policy states from the tube; False takes the stored states themselves."""
    lambda_: float = 0.9
    """Weight ratio between sub-trajectories one step apart in length."""
    huber_delta: float | None = 1.0
    """Residual, in nats, beyond which its loss is linear; None squares all, as SubTB does."""
    off_policy: float = 1.0
    """Weight of the off-policy term."""
    on_policy: float = 0.01
    """Weight of the on-policy term; 0 leaves its roll-out out of the computation."""
    coefficient_penalty: float = 1e-3
    """Weight of the mean square of the learned log-coefficients."""
    condition_dropout: float = 0.0
    """Share of examples that are trained without their context, which guidance needs."""

    def __post_init__(self):
        check_option("HybridConfig", "reward", self.reward, get_args(Reward))
        check_option("HybridConfig", "backward", self.backward, get_args(Backward))
        for name in ("start_std", "end_std", "log_std_range", "lambda_"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.huber_delta is not None and not self.huber_delta > 0:
            raise ValueError(f"huber_delta must be positive or None, got {self.huber_delta}.")
        for name in ("correlation", "condition_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        for name in ("off_policy", "on_policy", "coefficient_penalty"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not self.off_policy + self.on_policy > 0:
            raise ValueError("off_policy and on_policy must not both be zero.")


@dataclasses.dataclass(frozen=True)
class FeedbackConfig:
    """The closed loop: what a policy sees of the task at each of its states, and whom it follows."""

    sees: Sees = "gradient"
    """"gradient" and value of the context loss; or "loss", its value alone, without a gradient."""
    objective: Objective = "balance"
    """What it is trained by: the balance objective, the likelihood of stored transitions, or the task
    loss of what it generates."""
    widths: tuple[int, ...] = (32, 32)
    """Hidden layers of the rule that all weights share."""
    rule_alone: float = 1.0
    """Weight of the objective of the rule alone, beside that of the condition with or without it; a
    policy that sees the loss alone has none."""
    condition_alone: float = 0.3
    """Share of examples that follow the condition without the rule, as the gate's walk does."""
    level: float = 0.05
    """The condition is trusted fully on tasks more familiar than this share of the training tasks; and
    always by a policy that sees the loss alone."""

    def __post_init__(self):
        check_option("FeedbackConfig", "sees", self.sees, get_args(Sees))
        check_option("FeedbackConfig", "objective", self.objective, get_args(Objective))
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must be positive and at least one, got {self.widths}.")
        if not self.rule_alone > 0:
            raise ValueError(
                f"rule_alone must be positive, got {self.rule_alone}: on unfamiliar tasks the rule "
                "walks alone, so it must learn to."
            )
        if not 0 < self.condition_alone < 1:
            raise ValueError(
                "condition_alone must lie between 0 and 1, both excluded, got "
                f"{self.condition_alone}: the condition walks with the rule, and alone for the gate."
            )
        if not 0 < self.level <= 1:
            raise ValueError(f"level must be in (0, 1], got {self.level}.")


PAPER_LITERAL = HybridConfig(
    reward="end",
    backward="learned",
    per_dimension=False,
    start_std=1.0,
    end_std=0.5**0.5,
    correlation=0.0,
    log_std_range=4.0,
    perturb=False,
    huber_delta=None,
    on_policy=1.0,
    coefficient_penalty=0.0,
)
"""The objective of the Lo-Hp paper, as far as settings go, kept for comparison.

The paper's are: a flow that is a learned coefficient times the reward exp(-|s - theta_n|^2), with the
end theta_n of a sub-trajectory at both of its ends; a P_B of the network's own; probabilities of all
weights together; stored states as they are; starts at N(0, I), by `start_std`; a policy that learns from
its own states and from stored ones.

Not the paper's are: weights that are standardised, around a start theta_0 that all tasks share, where
the paper draws theta_0 from N(0, I); a last coefficient that is pinned at 1, where it learns all;
standard deviations that are bounded; and λ, the equal weights of both terms, the network and the
training. The paper warns that training diverges at rates above .001, and our default is .003.

It falls far behind: `end` rewards cannot all be met, and a learned P_B leaves the speed of the policy
free, so that a lower loss need not mean better weights."""
