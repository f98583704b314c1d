"""Checks of the section `rl`: combinations of its fields, and with other sections. `checks.check` calls `check_rl`."""

from t5like.config.model_checks import require
from t5like.config.rl_schema import RLConfig
from t5like.config.schema import Config


def check_rl(config: Config) -> None:
    """Refuse a section that can't be trained with.

    Raises:
        ConfigError: with field, value, rule, and a value that works.
    """
    rl, data, train = config.rl, config.data, config.train
    if rl.method == "none":
        require(config, rl == RLConfig(), "rl.method", "must be set where other fields of rl are; use policy")
        return
    rule = f"must be supervised with rl.method={rl.method}; use supervised"
    require(config, data.objective == ("supervised",), "data.objective", rule)
    require(config, not data.rates, "data.rates", "must be empty with t5like rl: sources are mixed by their size")
    require(config, not data.phase_boundaries, "data.phase_boundaries", "must be empty with t5like rl; remove it")
    rule = "is for t5like train, and does nothing in t5like rl; leave it out"
    require(config, not config.evaluate.samples, "evaluate.samples", rule)
    if rl.uses_pairs:
        rule = f"must be 1 with rl.method={rl.method}, whose answers are given"
        require(config, rl.updates_per_rollout == 1, "rl.updates_per_rollout", rule)
        rule = f"must be empty with rl.method={rl.method}, which trains on pairs; use rl.method=policy"
        require(config, not rl.rewards, "rl.rewards", rule)
        name, other = ("chosen", "rejected") if rl.chosen_field == "rejected" else ("rejected", "chosen")
        rule = f"must be another field than rl.{other}_field; use {name}"
        require(config, rl.rejected_field != rl.chosen_field, f"rl.{name}_field", rule)
        return
    _check_policy(config)
    for name in ("num_steps", "checkpoint_every", "eval_every", "keep_every"):
        value, updates = getattr(train, name), rl.updates_per_rollout
        rule = f"must be a multiple of rl.updates_per_rollout={updates}; use {-(-value // updates) * updates}"
        require(config, value % updates == 0, f"train.{name}", rule)


def _check_policy(config: Config) -> None:
    rl = config.rl
    require(config, bool(rl.rewards), "rl.rewards", "must name a reward of an answer; use exact_match")
    for name in ("kl_coefficient", "max_kl"):
        required = rl.reference == "first" or not getattr(rl, name)
        require(config, required, f"rl.{name}", "needs the first weights as reference; use rl.reference=first")
    rule = f"must be at most data.targets_length={config.data.targets_length}; use {config.data.targets_length // 4}"
    require(config, rl.overlong_tokens <= config.data.targets_length, "rl.overlong_tokens", rule)
    rule = "must be token with rl.advantage=gae, whose advantages differ between tokens; use token"
    require(config, rl.advantage != "gae" or rl.ratio == "token", "rl.ratio", rule)
