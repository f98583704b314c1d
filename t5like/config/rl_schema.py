"""The config section `rl`: training by rewards, and from pairs of a chosen and a rejected answer (`t5like rl`).

The defaults are DAPO's reduction with Dr. GRPO's advantage, no KL term, and one update per rollout. Papers: GRPO (Shao
et al. 2024, arXiv:2402.03300), Dr. GRPO (Liu et al. 2025, arXiv:2503.20783), RLOO (Ahmadian et al. 2024,
arXiv:2402.14740), DAPO (Yu et al. 2025, arXiv:2503.14476), GSPO (Zheng et al. 2025, arXiv:2507.18071), PPO (Schulman et
al. 2017, arXiv:1707.06347), DPO (Rafailov et al. 2023, arXiv:2305.18290), IPO (Azar et al. 2023, arXiv:2310.12036),
ORPO (Hong et al. 2024, arXiv:2403.07691), SimPO (Meng et al. 2024, arXiv:2405.14734).
"""

import dataclasses
from typing import Annotated, Literal

from t5like.config.field_types import NotNegative, Positive, Range

Method = Literal["none", "policy", "dpo", "ipo", "orpo", "simpo", "reward_model"]
PAIR_METHODS = ("dpo", "ipo", "orpo", "simpo", "reward_model")  # those that train on pairs of answers
Advantage = Literal["grpo", "dr_grpo", "rloo", "reinforce", "gae"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig:
    # What t5like rl trains. policy: the model, by rewards of its own answers. dpo, ipo, orpo, simpo: the model, from
    # pairs of answers. reward_model: a scalar head, from pairs (Bradley-Terry). none: t5like train.
    method: Method = "none"

    # Rewards of an answer, as NAME, NAME:ARGUMENT or MODULE:FUNCTION; see docs/rl.md. Their weighted sum is the reward.
    rewards: tuple[str, ...] = ()
    reward_weights: Annotated[tuple[float, ...], Range(-1e9, 1e9)] = ()  # weight of each reward; empty: 1
    # seconds after which the reward of an answer has failed
    reward_timeout_seconds: Annotated[float, Range(above=0, most=86_400)] = 10.0
    reward_workers: Annotated[int, Range(0, 1024)] = 0  # processes that compute rewards; 0: one per CPU core
    # Reward of an answer whose reward failed. exclude: none; its advantage is 0 and it is not part of the baseline.
    # zero: 0.
    failed_reward: Literal["exclude", "zero"] = "exclude"
    # Answers that reach data.targets_length without EOS. keep: like others. mask: no loss; they are part of the
    # baseline.
    truncated_answers: Literal["keep", "mask"] = "keep"
    # Soft overlong penalty (DAPO): the reward falls linearly to -1 over this number of tokens before
    # data.targets_length; 0: none.
    overlong_tokens: NotNegative = 0

    answers_per_prompt: Annotated[int, Range(2, 2**16)] = 8  # group size, G in GRPO
    temperature: Annotated[float, Range(1e-3, 1e3)] = 1.0  # of sampling, and of the log-probabilities in the loss
    updates_per_rollout: Annotated[int, Range(1, 1000)] = 1  # updates with the same answers (mu in GRPO)
    # Additional rollouts of a step that replace prompts whose answers all have the same reward, with other prompts
    # (DAPO's dynamic sampling); 0: such prompts stay, with advantage 0 (reinforce: that of the step).
    redraws: Annotated[int, Range(0, 100)] = 0

    # grpo: (reward - mean) / standard deviation of the prompt's answers. dr_grpo: reward - mean. rloo: reward - mean of
    # the prompt's other answers. reinforce: reward - mean of all answers of the step. gae: PPO's, with a value head.
    advantage: Advantage = "dr_grpo"
    ratio: Literal["token", "sequence"] = "token"  # importance ratio of each token, or of the whole answer (GSPO)
    # token_mean: mean over all tokens of the batch (DAPO). sequence_mean: mean over answers of their token means
    # (GRPO). constant: sum over tokens / (answers x data.targets_length) (Dr. GRPO).
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    clip_low: Annotated[float, Range(0, 1)] = 0.2  # ratios below 1 - clip_low have no gradient if advantage < 0
    clip_high: Annotated[float, Range(0, 1e6)] = 0.28  # ratios above 1 + clip_high have none if advantage > 0
    # cap of the importance weight that corrects differences between the sampler's and the trainer's probabilities; 0:
    # no correction
    importance_cap: Annotated[float, Range(0, 1e6)] = 2.0
    # Model of the KL divergence. first: the run's first weights, whose checkpoint is kept. none: no KL.
    reference: Literal["none", "first"] = "none"
    kl_coefficient: Annotated[float, Range(0, 1e6)] = 0.0  # weight of the KL divergence (beta)
    # Estimator of the KL divergence of a token (Schulman 2020, "Approximating KL Divergence"). k3_plus: the value of
    # k3 with the gradient of k2.
    kl_estimator: Literal["k1", "k2", "k3", "k3_plus"] = "k3_plus"
    kl_as: Literal["loss", "reward"] = "loss"  # whether the KL is a term of the loss or subtracted from the reward
    max_kl: Annotated[float, Range(0, 1e6)] = 0.0  # mean KL per token after which the run ends (5); 0: no limit
    entropy_coefficient: Annotated[float, Range(0, 1e6)] = 0.0  # weight of the entropy bonus

    discount: Annotated[float, Range(0, 1)] = 1.0  # gae: gamma
    gae_lambda: Annotated[float, Range(0, 1)] = 0.95  # gae: lambda
    value_coefficient: Annotated[float, Range(0, 1e6)] = 0.1  # gae: weight of the value loss
    value_clip: Annotated[float, Range(0, 1e6)] = 0.2  # gae: values further from the old ones are clipped; 0: none

    # dpo, ipo: beta or tau; orpo: weight of the odds ratio (lambda); simpo: beta
    beta: Annotated[float, Range(1e-9, 1e6)] = 0.1
    margin: Annotated[float, Range(-1e6, 1e6)] = 0.0  # simpo: gamma; reward_model: margin of the scores
    chosen_field: str = "chosen"  # field of the better answer; the prompt is data.inputs_template
    rejected_field: str = "rejected"  # field of the worse answer

    eval_prompts: Positive = 64  # held-out prompts, or pairs, per evaluation
    table_every: NotNegative = 100  # steps between tables of sampled answers with rewards in RUN/answers; 0: none

    @property
    def uses_pairs(self) -> bool:
        """Whether the method trains on pairs of answers."""
        return self.method in PAIR_METHODS

    @property
    def answers(self) -> int:
        """Answers of each prompt in the loss; 1 of each row without reinforcement learning."""
        if self.uses_pairs:
            return 2
        return self.answers_per_prompt if self.method == "policy" else 1

    @property
    def needs_reference(self) -> bool:
        """Whether the loss needs the log-probabilities of the run's first weights."""
        return self.method in ("dpo", "ipo") or (self.method == "policy" and self.reference == "first")

    @property
    def has_scalar_head(self) -> bool:
        """Whether the model has a scalar head: of values, or of a reward model."""
        return self.method == "reward_model" or (self.method == "policy" and self.advantage == "gae")
