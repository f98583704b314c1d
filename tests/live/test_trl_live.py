"""Advantages, losses, KL and gradients equal those of TRL's trainers, on the same hidden states, masks and rewards.

`make parity` installs torch, transformers and TRL and runs this; `make test` does not. TRL's trainers are real, with
tiny random models. The head's weight is what is compared: its gradient contains those of all log-probabilities.
"""

import copy
import functools

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
import trl
from trl.experimental import cpo, orpo

from t5like.config.rl_schema import RLConfig
from t5like.optim import losses
from t5like.rl.advantages import advantages, has_spread
from t5like.rl.policy_loss import policy_loss
from t5like.rl.preference_loss import preference_loss

IDS, GROUPS, SIZE, LENGTH = 32, 2, 4, 6
TEMPERATURE = 0.8
NAN = float("nan")
SETTINGS = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
SETTINGS |= {"activation_checkpointing": False}
LLAMA = {"vocab_size": IDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
T5 = {"vocab_size": IDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
T5 |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "tie_word_embeddings": False}


@functools.cache
def tokenizer():
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(3, IDS))]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    model = tokenizers.Tokenizer(model)
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def llama(seed: int = 0):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, initializer_range=0.3))


def t5():
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # transformers 5 ties them always
    return model


def rewarded(trainer, config, rewards, **settings):
    """A trainer by rewards, whose reward function returns `rewards`; NaN: it returns no reward.

    TRL multiplies the KL divergence by the ratio unless `use_bias_correction_kl` is off; ours has k3_plus instead.
    """
    if config is trl.GRPOConfig:
        settings = {"use_bias_correction_kl": False, **settings}
    data = datasets.Dataset.from_dict({"prompt": ["w3 w4 w5"] * GROUPS})
    return trainer(
        model=llama(),
        reward_funcs=lambda completions, **_: [None if np.isnan(x) else float(x) for x in np.ravel(rewards)],
        args=config(
            **SETTINGS,
            num_generations=SIZE,
            per_device_train_batch_size=GROUPS * SIZE,
            max_completion_length=LENGTH,
            temperature=TEMPERATURE,
            beta=0.0,
            **settings,
        ),
        train_dataset=data,
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize(
    "kind, trainer, config, settings",
    [
        ("grpo", trl.GRPOTrainer, trl.GRPOConfig, {"scale_rewards": "group"}),
        ("dr_grpo", trl.GRPOTrainer, trl.GRPOConfig, {"scale_rewards": "none"}),
        ("rloo", trl.RLOOTrainer, trl.RLOOConfig, {}),
    ],
    ids=["grpo", "dr_grpo", "rloo"],
)
def test_advantages_are_those_of_trl(rng, kind, trainer, config, settings):
    """With a failed reward, and a group without spread; TRL generates the answers, whose rewards are given."""
    for rewards in (
        rng.normal(size=(GROUPS, SIZE)),
        np.array([[1, 0, NAN, 1], [0.5] * 4]),
        [[2, NAN, NAN, NAN], [1, 0, 0, 0]],
    ):
        made = rewarded(trainer, config, rewards, **settings)
        prompts = [{"prompt": "w3 w4 w5"}] * SIZE + [{"prompt": "w6"}] * SIZE
        theirs = made._generate_and_score_completions(prompts)["advantages"]
        np.testing.assert_allclose(advantages(kind, rewards).ravel(), theirs, atol=1e-5)
        if kind != "rloo" and np.isfinite(rewards).sum(1).min() > 1:  # TRL has no standard deviation of one reward
            [share] = made._metrics["train"]["frac_reward_zero_std"]
            assert share == pytest.approx(1 - has_spread(rewards).mean())


def answers(rng):
    """Ragged prompts, padded on the left, and ragged answers, padded on the right; off-policy, with a reference."""
    count = GROUPS * SIZE
    prompt_lengths, lengths = rng.integers(1, 5, count), rng.integers(1, LENGTH + 1, count)
    prompt_mask = np.arange(4) >= 4 - prompt_lengths[:, None]
    mask = np.arange(LENGTH) < lengths[:, None]
    ids = rng.integers(3, IDS, (count, 4 + LENGTH))
    ids[~np.concatenate([prompt_mask, mask], 1)] = 0
    noise = lambda size: torch.tensor(size * rng.normal(size=(count, LENGTH)), dtype=torch.float32)
    with torch.no_grad():
        model = rewarded(trl.GRPOTrainer, trl.GRPOConfig, []).model
        inputs = torch.tensor(ids), torch.tensor(np.concatenate([prompt_mask, mask], 1)).long()
        now = model(inputs[0], attention_mask=inputs[1], labels=inputs[0], fused_lm_head=True).log_probs[:, -LENGTH:]
    return {
        "prompt_ids": inputs[0][:, :4],
        "prompt_mask": inputs[1][:, :4],
        "completion_ids": inputs[0][:, 4:],
        "completion_mask": inputs[1][:, 4:],
        "advantages": torch.tensor(rng.normal(size=count), dtype=torch.float32),
        "old_per_token_logps": now + noise(0.3),
        "ref_per_token_logps": now + noise(0.5),
        "num_items_in_batch": torch.tensor(mask.sum()),
    }


def theirs_of(trainer, inputs, **changed):
    """TRL's loss, the gradient of the head's weight, and the metrics."""
    trainer = copy.copy(trainer)
    trainer._metrics = {"train": {name: [] for name in ("kl", "entropy", "policy_loss", "entropy_coef")}}
    trainer._metrics["train"] |= {f"clip_ratio/{name}": [] for name in ("low_mean", "low_min", "high_mean", "high_max")}
    trainer._metrics["train"] |= {"clip_ratio/region_mean": []}
    trainer.current_gradient_accumulation_steps = 1
    for name, value in changed.items():
        assert hasattr(trainer, name), name
        setattr(trainer, name, value)
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items() if values}
    return loss.item(), trainer.model.lm_head.weight.grad.numpy().copy(), metrics


def by_group(tensor):
    return jnp.asarray(tensor.numpy(), jnp.float32).reshape(GROUPS, SIZE, -1)


def ours_of(rl: RLConfig, model, inputs, *, longest: int = LENGTH, sampler=None):
    """Our loss, the gradient of the head's weight, and the metrics, from the hidden states of TRL's model."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        hidden = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1][:, -LENGTH - 1 : -1]
    hidden, targets = jnp.asarray(hidden.numpy()), jnp.asarray(inputs["completion_ids"].numpy())
    arrays = {"advantages_BGL": by_group(inputs["advantages"]), "mask_BGL": by_group(inputs["completion_mask"])}
    names = {"old_log_p_BGL": "old_per_token_logps", "reference_log_p_BGL": "ref_per_token_logps"}
    arrays |= {name: by_group(inputs[key]) for name, key in names.items() if key in inputs}
    if sampler is not None:
        arrays["sampler_log_p_BGL"] = by_group(sampler)

    def mean(weight):
        logits = hidden @ weight.T / TEMPERATURE
        log_p = -losses.nats(logits, targets).reshape(GROUPS, SIZE, LENGTH)
        shares = jax.nn.softmax(logits)
        entropy = -(shares * jax.nn.log_softmax(logits)).sum(-1).reshape(GROUPS, SIZE, LENGTH)
        loss = policy_loss(rl, longest, log_p_BGL=log_p, entropy_BGL=entropy, **arrays)
        return loss.objective / loss.metrics["loss"].weight, loss.metrics

    weight = jnp.asarray(model.lm_head.weight.detach().numpy())
    (loss, metrics), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(weight)
    return float(loss), np.asarray(gradient), {name: value.mean() for name, value in metrics.items()}


def equal(ours, theirs):
    """The loss, the gradient and all metrics that both have."""
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5, rel=1e-5)
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5, rtol=1e-5)
    assert np.abs(theirs[1]).max() > 1e-3
    both = ours[2].keys() & theirs[2].keys()
    assert {"entropy", "clip_ratio/region_mean"} <= both
    assert {name: ours[2][name] for name in both} == pytest.approx({name: theirs[2][name] for name in both}, abs=1e-5)


def settings(aggregation, low, high, **changed):
    return RLConfig(aggregation=aggregation, clip_low=low, clip_high=high, **changed)


K3 = {"kl_coefficient": 0.04, "kl_estimator": "k3"}
CASES = {  # name: our settings, TRL's
    "grpo": (settings("sequence_mean", 0.2, 0.2, **K3), {"loss_type": "grpo", "beta": 0.04}),
    "dr_grpo": (settings("constant", 0.2, 0.2), {"loss_type": "dr_grpo"}),
    "dapo": (settings("token_mean", 0.2, 0.28), {"loss_type": "dapo"}),
    "gspo": (
        settings("sequence_mean", 3e-4, 4e-4, ratio="sequence"),
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
    "gspo with wide limits": (
        settings("sequence_mean", 0.1, 0.1, ratio="sequence", **K3),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.04},
    ),
    "entropy bonus": (
        settings("token_mean", 0.2, 0.28, entropy_coefficient=0.1),
        {"loss_type": "dapo", "_entropy_bonus_enabled": True, "entropy_coef": 0.1},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_policy_losses_and_gradients_are_those_of_trl(rng, name):
    rl, changed = CASES[name]
    low, high = {"epsilon_low": rl.clip_low}, {"epsilon_high": rl.clip_high}
    trainer = rewarded(trl.GRPOTrainer, trl.GRPOConfig, [])
    inputs = answers(rng)
    theirs = theirs_of(trainer, inputs, **low, **high, **changed)
    equal(ours_of(rl, trainer.model, inputs), theirs)
    assert theirs[2]["clip_ratio/region_mean"] > 0


def test_on_policy_losses_and_gradients_are_those_of_trl(rng):
    trainer = rewarded(trl.GRPOTrainer, trl.GRPOConfig, [])
    inputs = {name: value for name, value in answers(rng).items() if "per_token" not in name}
    theirs = theirs_of(trainer, inputs, loss_type="dapo", epsilon_high=0.28)
    equal(ours_of(settings("token_mean", 0.2, 0.28), trainer.model, inputs), theirs)


def test_truncated_importance_weights_are_those_of_trl(rng):
    trainer = rewarded(trl.GRPOTrainer, trl.GRPOConfig, [])
    inputs = answers(rng)
    sampler = inputs["old_per_token_logps"] + torch.tensor(rng.normal(size=(GROUPS * SIZE, LENGTH))).float()
    ratio = torch.exp(inputs["old_per_token_logps"] - sampler)  # TRL's vllm_importance_sampling_mode token_truncate
    theirs = theirs_of(
        trainer,
        inputs | {"importance_sampling_ratio": torch.clamp(ratio, max=1.5)},
        loss_type="dapo",
        epsilon_high=0.28,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
    )
    ours = ours_of(settings("token_mean", 0.2, 0.28, importance_cap=1.5), trainer.model, inputs, sampler=sampler)
    equal(ours, theirs)
    assert 0 < ours[2]["importance_weight/capped"] < 1


def test_the_gradient_of_rloo_is_that_of_trl(rng):
    """On policy: TRL has one ratio for the product of an answer's probabilities, whose gradient is their sum's."""
    trainer = rewarded(trl.RLOOTrainer, trl.RLOOConfig, [])
    inputs = {name: value for name, value in answers(rng).items() if "per_token" not in name}
    with torch.no_grad():
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        log_p, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, LENGTH)
    theirs = theirs_of(trainer, inputs | {"old_logps": (log_p * inputs["completion_mask"]).sum(1)})
    ours = ours_of(settings("constant", 0.2, 0.2), trainer.model, inputs, longest=1)
    equal((theirs[0], *ours[1:]), theirs)
    value = ours_of(settings("sequence_mean", 0.2, 0.2, ratio="sequence"), trainer.model, inputs)[0]
    assert value == pytest.approx(theirs[0], abs=1e-5)


def pairs(rng, count=3):
    lengths = rng.integers(1, 7, (count, 3))
    words = lambda n: "".join(f" w{i}" for i in rng.integers(3, IDS, n))
    rows = [[words(n) for n in row] for row in lengths]
    return datasets.Dataset.from_dict(
        {n: list(x) for n, x in zip(("prompt", "chosen", "rejected"), zip(*rows, strict=True), strict=True)}
    )


def our_preferences(rl, weight, hidden, targets, mask, reference=None):
    """Our loss of [chosen; rejected] rows, the gradient of the head's weight, and the metrics."""
    hidden, targets, mask = (jnp.asarray(x.numpy()) for x in (hidden, targets, mask))
    count = mask.sum(1)
    half = len(mask) // 2

    def mean(weight):
        log_p = -(losses.nats(hidden @ weight.T, targets) * mask).sum(1)
        references = () if reference is None else (reference[:half], reference[half:])
        loss = preference_loss(rl, log_p[:half], log_p[half:], count[:half], count[half:], *references)
        return loss.objective / loss.metrics["loss"].weight, loss.metrics

    (loss, metrics), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(jnp.asarray(weight.detach().numpy()))
    return float(loss), np.asarray(gradient), {name: value.mean() for name, value in metrics.items()}


def equal_preferences(ours, loss, weight, metrics):
    assert ours[0] == pytest.approx(loss.item(), abs=1e-5, rel=1e-5)
    np.testing.assert_allclose(ours[1], weight.grad.numpy(), atol=1e-5, rtol=1e-5)
    assert np.abs(ours[1]).max() > 1e-3
    names = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
    names += ["logps/chosen", "logps/rejected"]
    assert {n: ours[2][n] for n in names} == pytest.approx({n: float(metrics[n]) for n in names}, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("method, loss_type", [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_dpo_and_ipo_are_those_of_trl(rng, method, loss_type):
    config = trl.DPOConfig(**SETTINGS, beta=0.3, loss_type=loss_type)
    trainer = trl.DPOTrainer(
        model=llama(), ref_model=llama(seed=1), args=config, train_dataset=pairs(rng), processing_class=tokenizer()
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    shifted = {name: batch[name][:, 1:] for name in ("input_ids", "completion_mask")}
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        hidden = trainer.model(**inputs, output_hidden_states=True).hidden_states[-1][:, :-1]
        logits = trainer.ref_model(**inputs).logits[:, :-1]
    reference = -losses.nats(jnp.asarray(logits.numpy()), jnp.asarray(shifted["input_ids"].numpy()))
    reference = (reference * shifted["completion_mask"].numpy()).sum(1)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    weight = trainer.model.lm_head.weight
    rl = RLConfig(method=method, beta=0.3)
    ours = our_preferences(rl, weight, hidden, shifted["input_ids"], shifted["completion_mask"], reference)
    equal_preferences(ours, loss, weight, {name: values[0] for name, values in trainer._metrics["train"].items()})


def encoder_decoder_pairs(trainer, config, rng, **changed):
    """A trainer of a T5, its batch, and the decoder's hidden states, labels and mask of [chosen; rejected] rows."""
    trainer = trainer(
        model=t5(),
        args=config(
            **SETTINGS, remove_unused_columns=False, is_encoder_decoder=True, max_completion_length=8, **changed
        ),
        train_dataset=pairs(rng),
        processing_class=tokenizer(),
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    rows = trainer.concatenated_inputs(batch, is_encoder_decoder=True, padding_value=0)
    labels = rows["concatenated_labels"]
    with torch.no_grad():
        hidden = trainer.model(
            rows["concatenated_input_ids"],
            attention_mask=rows["concatenated_attention_mask"],
            decoder_input_ids=trainer._shift_right(labels),
            output_hidden_states=True,
        ).decoder_hidden_states[-1]
    return trainer, batch, (hidden, labels.clamp(min=0), labels != -100)


def test_simpo_is_that_of_trl(rng):
    trainer, batch, rows = encoder_decoder_pairs(
        cpo.CPOTrainer, cpo.CPOConfig, rng, loss_type="simpo", cpo_alpha=0.0, beta=2.5, simpo_gamma=0.5
    )
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    loss.backward()
    weight = trainer.model.lm_head.weight
    ours = our_preferences(RLConfig(method="simpo", beta=2.5, margin=0.5), weight, *rows)
    equal_preferences(ours, loss, weight, metrics)


def test_orpo_is_that_of_trl(rng):
    """One pair at a time: TRL divides the log-likelihood of a batch by its tokens, the paper that of each answer."""
    trainer, batch, rows = encoder_decoder_pairs(orpo.ORPOTrainer, orpo.ORPOConfig, rng, beta=0.4)
    count = len(batch["prompt"])
    parts = [
        trainer.get_batch_loss_metrics(trainer.model, {name: value[i : i + 1] for name, value in batch.items()})
        for i in range(count)
    ]
    loss = sum(loss for loss, _ in parts) / count
    loss.backward()
    metrics = {name: np.mean([metrics[name] for _, metrics in parts]) for name in parts[0][1]}
    weight = trainer.model.lm_head.weight
    ours = our_preferences(RLConfig(method="orpo", beta=0.4), weight, *rows)
    equal_preferences(ours, loss, weight, metrics)
    assert ours[2]["nll_loss"] == pytest.approx(metrics["nll_loss"], abs=1e-5)
