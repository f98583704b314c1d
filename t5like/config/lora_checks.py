"""Checks of the section `lora`: combinations of its fields, and with other sections. `checks.check` calls this."""

from t5like.config.lora_schema import LoRAConfig
from t5like.config.model_checks import require
from t5like.config.schema import Config, InitConfig, OptimizerConfig


def check_lora(config: Config) -> None:
    """Refuse a section that can't be trained with.

    Raises:
        ConfigError: with field, value, rule, and a value that works.
    """
    lora, init = config.lora, config.init_from
    if not lora.rank:
        rule = "must be at least 1 where other fields of lora are set; use 16"
        require(config, lora == LoRAConfig(), "lora.rank", rule)
        return
    rule = f"must be at most model.model_dim={config.model.model_dim}, the largest rank of a kernel; use 16"
    require(config, lora.rank <= config.model.model_dim, "lora.rank", rule)
    require(config, bool(lora.targets), "lora.targets", "must name kernels of the layers; use .*")
    rule = "must be empty with lora.rank, which trains nothing but lora.targets and lora.trained; leave it out"
    require(config, config.optimizer.frozen == OptimizerConfig.frozen, "optimizer.frozen", rule)
    for field in ("adapt", "reinitialize", "decoder_checkpoint"):
        rule = "must be empty with lora.rank, whose base is read again as it is; leave it out, or train without lora"
        require(config, getattr(init, field) == getattr(InitConfig, field), f"init_from.{field}", rule)
