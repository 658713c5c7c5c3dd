"""Losses against TRL 1.16, through TRL's own `compute_loss`, in value and in gradient.

What TRL does otherwise than jaxpref, found here and not copied.  Every line is asserted
by the test whose name holds the words in the third column, here or, for the trainers
beside DPO's, in `test_losses_against_trl_others`.

    TRL                                       jaxpref                     test
    ----------------------------------------  --------------------------  -------------
    DPO trainer
    "sigmoid" ignores label_smoothing         `cdpo` is its own loss      smoothing
    "robust" takes label_smoothing >= 1/2     refused                     robust_range,
      (a warning; at 1/2 it divides by 0)                                 genuine
    "exo_pair" holds its smoothing in         in the precision of the     exo_precision
      float32 whatever the log-probs            log-probs
    alpha_divergence fails in float64         any float                   alpha_float64
    f_alpha_divergence_coef is 1 - alpha      the paper's alpha           dpo_trainer
    forward_kl overflows at log-ratios below  exponent clipped at 80      overflow
      -88: NaN gradient
    "discopop" is 0 times infinity, NaN, at   finite                      overflow
      large negative margins
    use_weighting weighs by w_w w_l           by min(1, w_w w_l), as the  wpo_cap
                                                authors' code
    "hinge" at its kink: gradient 0           mean of both sides'         hinge_kink
    "ipo", "sigmoid_norm" count the first     lengths are those of the    promptless
      token of an answer without a prompt,      tokens in the sums
      which has no log-prob
    "sft" is a mean over the batch's tokens   one sum for each pair       sft
    rewards/accuracies: a tie counts 0        1/2                         metrics
    rewards/* is beta times the log-ratio,    the caller decides          metrics
      also under an f-divergence; under
      ld_alpha that of discounted log-probs

    KTO trainer
    mismatched answers: those of one batch    log-probs of mismatched     kto_trainer_
      rotated by one, so that a batch of one    answers are an argument     rotates
      has its own answer
    mean over the losses that are not NaN     NaN is shown                kto_drops

    CPO trainer (experimental)
    likelihood: a mean over the batch's       over each answer's tokens   cpo_nll
      tokens
    "simpo" has a likelihood beside it        `simpo` has none            simpo_has
      unless cpo_alpha is 0
    "sigmoid" with label_smoothing            `cdpo`, reference 0         cpo_smoothing
    alpha: infinity - infinity, NaN, for      exponent clipped            alpha_po
      improbable answers
    loss_type "alphapo" is refused, "simpo"   `alpha_po`                  alpha_po
      with alpha is it

    ORPO trainer (experimental)
    likelihood of prompt AND answer, mean     of the answer, mean over    orpo
      over the batch's tokens                   its tokens
    preference term in float32 always         in the precision of the     orpo
                                                log-probs
    NaN gradient for an answer of             its average counts as       orpo_certain
      probability 1                             -1e-6

    Reward trainer
    accuracy: a tie counts 0                  1/2                         reward_ties

Options of TRL without a counterpart here: label_smoothing of "aot" and "aot_unpaired"
and of the CPO trainer's "simpo", and use_weighting of other losses than "sigmoid".
"""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl", "1.16", reason="needs TRL 1.16")

import jax.numpy as jnp

from jaxpref import losses
from tests.parity import trl_losses as trl
from tests.parity.trl_losses import (
    DTYPES,
    Case,
    assert_agree,
    batch,
    dtypes_of,
    likelihood,
    mean,
    our_loss,
    ours,
    theirs,
)

pytestmark = pytest.mark.parity

ORDINARY = (0, 1, 2, 3)


def same(loss_type, loss, *betas, **more):
    """Cases whose only option is beta; `more` are TRL's."""
    return [
        Case({"loss_type": loss_type, "beta": beta} | more, loss, {"beta": beta})
        for beta in betas
    ]


def robust(rate, **more):
    theirs = {"loss_type": "robust", "beta": 0.1, "label_smoothing": rate}
    return Case(theirs, "rdpo", {"beta": 0.1, "flip_rate": rate}, **more)


def exo(beta):
    # Not a large smoothing with a large beta: the loss, a KL divergence, is then near 0
    # and a difference of equals on both sides.
    theirs = {"loss_type": "exo_pair", "beta": beta, "label_smoothing": 1e-3}
    ours = {"beta": beta, "label_smoothing": 1e-3}
    return Case(theirs, "exo_pair", ours, dtypes=("float32",))


def discopop(beta, tau):
    theirs = {"loss_type": "discopop", "beta": beta, "discopop_tau": tau}
    return Case(theirs, "discopop", {"beta": beta, "tau": tau}, batches=ORDINARY)


def divergence(theirs, loss, beta, **more):
    return Case(
        {"f_divergence_type": theirs, "beta": beta}, loss, {"beta": beta}, **more
    )


def alpha_divergence(alpha, beta):
    theirs = {"f_divergence_type": "alpha_divergence", "beta": beta}
    theirs["f_alpha_divergence_coef"] = 1 - alpha
    ours = {"alpha": alpha, "beta": beta}
    return Case(theirs, "alpha_dpo", ours, dtypes=("float32",))


DPO_CASES = [
    *same("sigmoid", "dpo", 0.01, 0.1, 2.0),
    *same("hinge", "hinge", 0.05, 0.7),
    *same("ipo", "ipo_averaged", 0.01, 0.1, 1.0),
    *map(exo, (0.1, 1.0)),
    *same("nca_pair", "nca_pair", 0.01, 1.0),
    *map(robust, (0.0, 0.1, 0.3)),
    # At 0.49 the mean nearly cancels, so its relative float32 error is above 1e-6.
    robust(0.49, dtypes=("float64",)),
    *same("bco_pair", "bco_pair", 0.01, 1.0),
    *same("sppo_hard", "sppo_hard", 0.001, 0.1),
    *same("aot", "aot", 0.01, 1.0),
    *same("aot_unpaired", "aot_unpaired", 0.01, 1.0),
    *same("apo_zero", "apo_zero", 0.1, 1.0),
    *same("apo_down", "apo_down", 0.1, 1.0),
    *(discopop(beta, tau) for beta in (0.05, 0.5) for tau in (0.05, 1.0)),
    *same("sigmoid_norm", "ln_dpo", 0.1, 5.0),
    *(divergence("js_divergence", "js_dpo", beta) for beta in (0.1, 1.0)),
    *(
        divergence("forward_kl", "forward_kl_dpo", beta, batches=ORDINARY)
        for beta in (0.1, 1.0)
    ),
    *(
        alpha_divergence(alpha, beta)
        for alpha in (0.25, 0.5, 0.75)
        for beta in (0.1, 1)
    ),
    *(
        Case({"ld_alpha": alpha, "beta": 0.1}, "ld_dpo", {"alpha": alpha, "beta": 0.1})
        for alpha in (0.0, 0.25, 1.0)
    ),
    *same("sigmoid", "wpo", 0.01, 0.1, use_weighting=True),
]


def dpo_loss(tokens, **options):
    trainer = trl.dpo_trainer(tokens, **options)
    return theirs(trainer, tokens.inputs, tokens.policy)


@pytest.mark.parametrize("case, dtype", dtypes_of(DPO_CASES))
def test_dpo_trainer(case, dtype):
    objective = mean(getattr(losses, case.loss), **case.options)
    for index in case.batches:
        tokens = batch(index, dtype)
        wanted = dpo_loss(tokens, **case.trl)
        assert_agree(our_loss(tokens, objective), wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dpo_trainer_sft(dtype):
    objective = lambda policy_chosen_logps, chosen_lengths: likelihood(
        policy_chosen_logps, chosen_lengths
    )
    for index in range(5):
        tokens = batch(index, dtype)
        wanted = dpo_loss(tokens, loss_type="sft")
        assert_agree(our_loss(tokens, objective), wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_losses_are_sums(dtype):
    """MPO: TRL's loss_weights correspond to a weighted sum here."""

    def objective(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        chosen_lengths,
    ):
        four = (
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
        )
        pairs = 0.8 * losses.dpo(*four) + 0.2 * losses.bco_pair(*four, beta=0.1)
        return jnp.mean(pairs) + 0.5 * likelihood(policy_chosen_logps, chosen_lengths)

    for index in range(5):
        tokens = batch(index, dtype)
        wanted = dpo_loss(
            tokens,
            loss_type=("sigmoid", "bco_pair", "sft"),
            loss_weights=[0.8, 0.2, 0.5],
        )
        assert_agree(our_loss(tokens, objective), wanted, dtype)


def test_reference_columns_are_the_reference_model():
    tokens = batch(2, "float32")
    trainer = trl.dpo_trainer(tokens)
    trainer.precompute_ref_logps = True
    trainer.ref_model = None
    names = ("chosen", "rejected")
    columns = {f"ref_{s}_logps": tokens.arrays[f"reference_{s}_logps"] for s in names}
    value, gradient = theirs(trainer, tokens.inputs | columns, tokens.policy)
    wanted, wanted_gradient = dpo_loss(tokens)
    assert value == wanted
    np.testing.assert_array_equal(gradient, wanted_gradient)


def test_metrics():
    tokens = batch(2, "float32")
    tied = tokens.reference.clone()
    tied[[0, 8]] = tokens.policy.detach()[[0, 8]]  # a pair at the reference
    tokens = dataclasses.replace(tokens, reference=tied)

    def logged(name, **options):
        trainer = trl.dpo_trainer(tokens, beta=0.3, **options)
        theirs(trainer, tokens.inputs, tokens.policy)
        (value,) = trainer._metrics["train"][f"rewards/{name}"]
        return value

    numbers = {n: jnp.asarray(t.detach().numpy()) for n, t in tokens.arrays.items()}
    rewards = {
        side: losses.implicit_rewards(
            numbers[f"policy_{side}_logps"],
            numbers[f"reference_{side}_logps"],
            beta=0.3,
        )
        for side in ("chosen", "rejected")
    }
    for side, values in rewards.items():
        np.testing.assert_allclose(logged(side), values.mean(), rtol=1e-6)
    margins = losses.reward_margins(rewards["chosen"], rewards["rejected"])
    np.testing.assert_allclose(logged("margins"), margins.mean(), rtol=1e-6)
    right = losses.reward_accuracies(rewards["chosen"], rewards["rejected"])
    assert (np.asarray(right) == 0.5).sum() == 1
    # A tie counts 1/2 here and 0 in TRL: half of one pair in eight.
    assert float(right.mean()) == logged("accuracies") + 0.5 / 8

    # TRL logs beta times the plain log-ratio as rewards for any divergence.
    forward = logged("margins", f_divergence_type="forward_kl")
    np.testing.assert_allclose(forward, margins.mean(), rtol=1e-6)
    discounted = {
        side: losses.length_desensitized(
            numbers[f"policy_{side}_logps"] - numbers[f"reference_{side}_logps"],
            numbers[f"policy_{side}_prefix_logps"]
            - numbers[f"reference_{side}_prefix_logps"],
            alpha=0.25,
        )
        for side in ("chosen", "rejected")
    }
    wanted = 0.3 * (discounted["chosen"] - discounted["rejected"]).mean()
    np.testing.assert_allclose(logged("margins", ld_alpha=0.25), wanted, rtol=1e-5)


def test_smoothing_is_ignored_by_sigmoid():
    tokens = batch(2, "float32")
    plain, smooth = dpo_loss(tokens), dpo_loss(tokens, label_smoothing=0.3)
    assert plain[0] == smooth[0]
    np.testing.assert_array_equal(plain[1], smooth[1])
    assert_agree(our_loss(tokens, mean(losses.dpo)), smooth)
    value, _ = our_loss(tokens, mean(losses.cdpo, flip_rate=0.3))
    assert abs(value / smooth[0] - 1) > 1e-2


def test_robust_range():
    tokens = batch(2, "float32")
    value, gradient = dpo_loss(tokens, loss_type="robust", label_smoothing=0.5)
    assert not np.isfinite(value) and not np.isfinite(gradient).all()
    value, gradient = dpo_loss(tokens, loss_type="robust", label_smoothing=0.7)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    for rate in (0.5, 0.7):
        with pytest.raises(ValueError, match="flip_rate"):
            our_loss(tokens, mean(losses.rdpo, flip_rate=rate))


def test_exo_precision():
    tokens = batch(2, "float64")
    value, _ = dpo_loss(tokens, loss_type="exo_pair", label_smoothing=1e-3)
    exact, _ = our_loss(tokens, mean(losses.exo_pair, beta=0.1, label_smoothing=1e-3))
    assert 1e-10 < abs(value / exact - 1) < 1e-7


def test_alpha_float64():
    with pytest.raises(KeyError):
        dpo_loss(batch(2, "float64"), f_divergence_type="alpha_divergence")


@pytest.mark.parametrize(
    "options, loss, ours",
    [
        ({"f_divergence_type": "forward_kl"}, "forward_kl_dpo", {"beta": 0.1}),
        ({"loss_type": "discopop", "beta": 1.0}, "discopop", {"beta": 1.0}),
    ],
    ids=["forward_kl", "discopop"],
)
def test_overflow(options, loss, ours):
    tokens = batch(4, "float32")
    value, gradient = dpo_loss(tokens, **options)
    assert not np.isfinite(value) and np.isnan(gradient).any()
    value, gradient = our_loss(tokens, mean(getattr(losses, loss), **ours))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_wpo_cap():
    tokens = batch(2, "float32")
    unlikely = tokens.log_squares - 1.5 * tokens.targets
    tokens = dataclasses.replace(tokens, log_squares=unlikely)
    numbers = {n: jnp.asarray(t.detach().numpy()) for n, t in tokens.arrays.items()}
    weights = jnp.exp(numbers["chosen_log_weights"] + numbers["rejected_log_weights"])
    assert weights.min() < 1 < weights.max()
    four = [numbers[name] for name in trl.reads(losses.dpo)]
    uncapped = float(jnp.mean(weights * losses.dpo(*four, beta=0.1)))
    capped = float(jnp.mean(jnp.minimum(weights, 1) * losses.dpo(*four, beta=0.1)))
    value, _ = dpo_loss(tokens, use_weighting=True)
    np.testing.assert_allclose(value, uncapped, rtol=1e-6)
    value, _ = our_loss(tokens, mean(losses.wpo, beta=0.1))
    np.testing.assert_allclose(value, capped, rtol=1e-6)


def test_hinge_kink():
    tokens = batch(0, "float32")
    policy = tokens.reference.clone()
    policy[0, tokens.targets[0].argmax()] += 2  # h = 1 exactly at beta 1/2
    tokens = dataclasses.replace(tokens, policy=policy.requires_grad_())
    value, gradient = dpo_loss(tokens, loss_type="hinge", beta=0.5)
    assert value == 0 and not gradient.any()
    value, gradient = our_loss(tokens, mean(losses.hinge, beta=0.5))
    assert value == 0
    np.testing.assert_array_equal(np.unique(gradient), [-0.25, 0, 0.25])


@pytest.mark.parametrize(
    "loss_type, loss", [("ipo", "ipo_averaged"), ("sigmoid_norm", "ln_dpo")]
)
def test_promptless(loss_type, loss):
    tokens = trl.draw(5, 4, prompts=(0, 0), lengths=(2, 8))
    objective = mean(getattr(losses, loss), beta=0.1)
    wanted = dpo_loss(tokens, loss_type=loss_type)
    value, _ = our_loss(tokens, objective)
    assert abs(value / wanted[0] - 1) > 1e-3
    longer = {n: t + n.endswith("_lengths") for n, t in tokens.arrays.items()}
    assert_agree(ours(objective, longer, tokens.policy), wanted)


# Trainers created by their own constructors, on a real model.

TEXTS = (
    ("Once upon a time", " there was a cat.", " the dog."),
    ("Tom", " was sad.", " saw a big red ball and smiled."),
    ("The big dog", " sat", " ran"),
)


@pytest.fixture(scope="module")
def genuine(stories260k, tmp_path_factory):
    """`make(trainer class, config class, rows, **options)`, policy and reference."""
    import transformers
    from datasets import Dataset

    tokenizer = transformers.AutoTokenizer.from_pretrained(stories260k)

    def model(seed, scale):
        made = transformers.AutoModelForCausalLM.from_pretrained(
            stories260k, dtype=torch.float32
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in made.parameters():
                weight += scale * torch.randn(weight.shape, generator=generator)
        return made

    def make(kind, config, rows, **options):
        settings = config(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
            disable_tqdm=True,
            **options,
        )
        return kind(
            model=model(0, 0.0),
            ref_model=model(1, 0.02),
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )

    return make


def test_genuine_dpo_trainer(genuine):
    rows = [dict(zip(("prompt", "chosen", "rejected"), texts)) for texts in TEXTS]
    options = {"loss_type": "robust", "label_smoothing": 0.5, "use_weighting": True}
    options["per_device_train_batch_size"] = 3
    trainer = genuine(trl.DPOTrainer, trl.DPOConfig, rows, **options)  # not refused
    inputs = next(iter(trainer.get_train_dataloader()))
    assert not np.isfinite(trainer.compute_loss(trainer.model, inputs).item())

    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    question = {"input_ids": inputs["input_ids"], "labels": labels}
    question |= {"attention_mask": inputs["attention_mask"], "fused_lm_head": True}
    with torch.no_grad():
        policy, reference = (
            model(**question).log_probs for model in (trainer.model, trainer.ref_model)
        )
        del question["fused_lm_head"]
        logits = trainer.model(**question).logits[:, :-1]
    squares = losses.log_collisions(jnp.asarray(logits.numpy()))
    tokens = trl.Tokens(
        ids=inputs["input_ids"],
        mask=inputs["completion_mask"],
        attention=inputs["attention_mask"],
        policy=policy.requires_grad_(),
        reference=reference,
        log_squares=torch.tensor(np.array(squares)),
    )
    for changes, loss in (
        ({"loss_types": ["sigmoid"], "use_weighting": False}, "dpo"),
        ({"loss_types": ["ipo"]}, "ipo_averaged"),
        ({"loss_types": ["sigmoid"], "ld_alpha": 0.5}, "ld_dpo"),
        ({"ld_alpha": None, "use_weighting": True}, "wpo"),
    ):
        vars(trainer).update(changes)
        wanted = trainer.compute_loss(trainer.model, inputs).item()
        value, _ = our_loss(tokens, mean(getattr(losses, loss), beta=0.1))
        np.testing.assert_allclose(value, wanted, rtol=1e-6)

    # Our log-weights, from their components.
    mask = tokens.targets.numpy().astype(bool)
    weights = losses.wpo_log_weights(
        *map(jnp.asarray, (policy.detach().numpy(), squares, mask))
    )
    sides = [tokens.arrays[f"{side}_log_weights"] for side in ("chosen", "rejected")]
    np.testing.assert_allclose(weights, torch.cat(sides), rtol=1e-6)


def test_genuine_kto_trainer_rotates_within_batches(genuine):
    answers = [" was " + word for word in "a big red sad cat".split()]
    rows = [
        {"prompt": "Tom", "completion": answer, "label": bool(index % 2)}
        for index, answer in enumerate(answers)
    ]
    trainer = genuine(
        trl.KTOTrainer, trl.KTOConfig, rows, per_device_train_batch_size=2
    )
    own, other = (
        list(trainer.train_dataset[name])
        for name in ("completion_ids", "KL_completion_ids")
    )
    assert other == [own[1], own[0], own[3], own[2], own[4]]
    # An odd last row is "mismatched" with its own answer.
    assert other[-1] == own[-1]
