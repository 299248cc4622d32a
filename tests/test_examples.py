"""The examples: they learn, an interrupted training ends where an uninterrupted one does, backends agree, commands run."""

import dataclasses
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastgen

for _needed in ("sklearn", "tqdm", "PIL", "matplotlib"):
    pytest.importorskip(_needed)
from PIL import Image  # noqa: E402

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def _imported(*names):
    """The examples as modules. They find each other by their folder, as scripts do; the names are given back at the end,
    since other folders have a common.py too."""
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(EXAMPLES))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(EXAMPLES))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


common, train_ddpm, train_gan, train_vae, likelihood, demo, sample_distributed, robot_policy, reinforce = _imported(
    "common", "train_ddpm", "train_gan", "train_vae", "likelihood", "demo", "sample_distributed", "robot_policy", "reinforce"
)

pytestmark = pytest.mark.usefixtures("one_thread")
DDPM = train_ddpm.Settings(batch_size=16, timesteps=50, base_channels=16)
LIKELIHOOD = likelihood.Settings(batch_size=16, timesteps=20, base_channels=16, learning_rate=5e-3, ema_decay=0.9)
GAN = train_gan.Settings(batch_size=16, k=2, latent_dim=4, base_channels=8)
VAE = train_vae.Settings(batch_size=16, latent_dim=3, hidden=32)


@pytest.fixture(scope="module")
def images():
    return common.load_digits()[0]


def ddpm(images, steps, settings=DDPM, **options):
    return train_ddpm.train(settings, images, steps=steps, progress=False, **options)


def gan(images, steps, settings=GAN, **options):
    return train_gan.train(settings, images, steps=steps, progress=False, **options)


def vae(images, steps, settings=VAE, **options):
    return train_vae.train(settings, train_vae.binarised(images), steps=steps, progress=False, **options)


def weights(trained):
    return (trained.model if hasattr(trained, "model") else trained.generator).state_dict()


# ---- data and randomness --------------------------------------------------------------------------------------------------


def test_data_is_scaled_and_split_without_overlap():
    train, train_labels, held_out, held_out_labels = common.load_digits()
    assert train.shape == (1437, 1, 8, 8)
    assert held_out.shape == (360, 1, 8, 8)
    assert train.dtype == torch.float32
    assert (train.min(), train.max()) == (-1, 1)
    assert len(train_labels) == 1437
    assert np.ptp(np.bincount(held_out_labels)) <= 3  # stratified: 35 to 37 of each digit
    assert len(torch.unique(torch.cat([train, held_out]).flatten(1), dim=0)) == 1797


def test_seeds_depend_on_every_argument_and_not_on_the_number_of_samples():
    seeds = {common.derived_seed(s, p, i) for s in (0, 1, -1) for p in ("noise", "batch") for i in (0, 1, 10)}
    assert len(seeds) == 18
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert torch.equal(common.sample_seeds(3, 8)[:2], common.sample_seeds(3, 2))


def test_initial_weights_leave_the_default_generator_alone():
    before = torch.get_rng_state()
    with common.initialised_from(0):
        first = torch.randn(3)
    assert torch.equal(torch.get_rng_state(), before)
    with common.initialised_from(0):
        assert torch.equal(torch.randn(3), first)


# ---- training -------------------------------------------------------------------------------------------------------------


def test_ddpm_learns(images):
    trained = ddpm(images, 60, dataclasses.replace(DDPM, learning_rate=5e-3))
    # an untrained network returns 0, whose loss is the noise's variance
    assert trained.losses[0] == pytest.approx(1.0, abs=0.15)
    assert np.mean(trained.losses[-10:]) < 0.6


def test_gan_learns_to_tell_real_from_fake(images):
    losses = gan(images, 25, dataclasses.replace(GAN, k=4)).losses
    # the discriminator starts undecided, at 2·log 2, and is far ahead of a generator that takes every fifth step
    assert losses[0]["discriminator"] == pytest.approx(2 * np.log(2), abs=0.15)
    assert np.mean([loss["discriminator"] for loss in losses[-5:]]) < 1.1
    assert all(np.isfinite(list(loss.values())).all() for loss in losses)


@pytest.mark.parametrize("train", [ddpm, gan, vae])
def test_resumed_equals_uninterrupted(train, images, tmp_path):
    whole = weights(train(images, 6))
    path = tmp_path / "checkpoint.pt"
    first = train(images, 4, checkpoint=path)
    torch.randn(17)  # whatever else draws from the default generator must not matter
    second = train(images, 6, checkpoint=path)
    assert (first.steps, second.steps, len(second.losses)) == (4, 6, 2)
    for name, value in weights(second).items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=0, msg=name)
    third = train(images, 6, checkpoint=path)  # nothing left to do
    assert (third.steps, third.losses) == (6, [])
    assert torch.equal(next(iter(weights(third).values())), next(iter(whole.values())))
    assert train(images, 1, checkpoint=path, fresh=True).steps == 1
    assert list(tmp_path.iterdir()) == [path]


def test_another_seed_gives_other_weights(images):
    first, second = weights(ddpm(images, 1)), weights(ddpm(images, 1, dataclasses.replace(DDPM, seed=1)))
    assert not torch.equal(first["head.weight"], second["head.weight"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(number, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    counter = torch.nn.Linear(1, 1)

    def train_step(step):
        with torch.no_grad():
            counter.weight.fill_(step)
        if step == 3:
            signal.raise_signal(number)
        return {"loss": torch.zeros(())}

    def run(steps):
        parts = {"counter": counter}
        return common.training_loop(parts, {"a": 1}, train_step, steps=steps, checkpoint=path, progress=False)

    previous = signal.getsignal(number)
    with pytest.raises(SystemExit, match="130"):
        common.run_main(lambda: run(10))
    assert "stopped after step 4 of 10: saved to" in capsys.readouterr().out
    assert signal.getsignal(number) is previous
    counter.weight.data.fill_(-1)
    assert run(4) == (4, [])
    assert counter.weight.item() == 3
    assert run(6)[0] == 6


def test_the_time_limit_counts_earlier_runs(images, tmp_path):
    path = tmp_path / "checkpoint.pt"
    trained = ddpm(images, 1000, seconds=1e-9, checkpoint=path)
    assert trained.steps == 1
    assert ddpm(images, 1000, seconds=1e-9, checkpoint=path).losses == []


# ---- the likelihood -------------------------------------------------------------------------------------------------------


def test_pixels_are_the_decoders_values(images):
    x0 = likelihood.pixels(images)
    assert x0.dtype == torch.uint8 and len(x0.unique()) == 17 and (x0.min(), x0.max()) == (0, 255)
    assert (x0 / 127.5 - 1 - images).abs().max() <= 0.5001 / 127.5


def test_a_trained_network_needs_fewer_bits(images):
    """And its bound is the sum of its parts, which the rates are sums of too."""
    x0, seeds = likelihood.pixels(images), common.sample_seeds(0, 12)
    found = []
    for steps in (1, 60):
        trained = likelihood.train(LIKELIHOOD, x0, steps=steps, progress=False)
        found.append(likelihood.evaluate(trained.model, x0[:12], trained.schedule, seeds))
    before, after = found
    assert after.bound.total.mean() < before.bound.total.mean() and after.bound.total.isfinite().all()
    torch.testing.assert_close(sum(after.parts.values()), after.bound.total)
    assert after.rate.shape == after.distortion.shape == (20,)
    torch.testing.assert_close(after.rate[-1], after.bound.prior.mean())
    torch.testing.assert_close(after.rate[0] + after.parts["L_0"].mean(), after.bound.total.mean())
    assert (after.rate.diff() <= 0).all() and after.distortion[0] < 0.5 * after.distortion[-1]


def test_the_distortion_is_that_of_each_timestep(images):
    """Whatever else goes through the network in the same call."""
    x0, seeds = likelihood.pixels(images)[:5], common.sample_seeds(0, 5)
    trained = likelihood.train(LIKELIHOOD, likelihood.pixels(images), steps=3, progress=False)
    found = likelihood.evaluate(trained.model, x0, trained.schedule, seeds).distortion
    for t in (0, 7, 19):
        x_t = fastgen.q_sample(x0, t, trained.schedule, seed=seeds, offset=t)
        with torch.no_grad():
            m = trained.model(x_t, torch.full((5,), t))[:, :1]
        _, predicted = fastgen.ddpm_step(x_t, m, t, trained.schedule, clip=1.0, return_x0=True, seed=0)
        error = predicted - (x0 / 127.5 - 1)
        torch.testing.assert_close(found[t], 127.5 * error.square().mean().sqrt(), rtol=1e-4, atol=1e-3)


# ---- the variational autoencoder ------------------------------------------------------------------------------------------


def test_vae_learns(images):
    losses = vae(images, 300, dataclasses.replace(VAE, learning_rate=5e-3)).losses
    for loss in losses:
        assert loss["loss"] == pytest.approx(loss["reconstruction"] + loss["kl"], rel=1e-5)
    assert losses[0]["loss"] == pytest.approx(64 * np.log(2), rel=0.05)  # undecided about each pixel
    assert np.mean([loss["loss"] for loss in losses[-10:]]) < 28
    assert np.mean([loss["kl"] for loss in losses[-10:]]) > 1  # z says something


def test_what_the_two_bounds_are(images):
    """Of a decoder that does not look at z, p(x) is known: the first bound falls short of log p(x) by the divergence, the other one
    comes to it."""
    model, bits = vae(images, 1).model, train_vae.binarised(images)[:6]
    with torch.no_grad():
        model.decoder[0].weight.zero_()
        model.encoder[-1].weight.mul_(2.0)  # so that the posterior is not the prior
        log_p = -torch.nn.functional.binary_cross_entropy_with_logits(
            model.decoded(torch.zeros(6, 3)).double(), bits.double(), reduction="none"
        ).sum((1, 2, 3))
        mean, log_variance = model.posterior(bits)
        prior = torch.distributions.Normal(torch.zeros(6, 3), torch.ones(6, 3))
        kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, torch.exp(0.5 * log_variance)), prior).sum(1)
    found = train_vae.evaluate(model, bits, seed=3, draws=4000)
    assert kl.min() > 0.01
    torch.testing.assert_close(found.bound.double(), log_p - kl.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.importance_weighted.double(), log_p, rtol=0, atol=0.02)


# ---- checkpoints ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_made_with_other_settings_is_refused(images, tmp_path):
    path = tmp_path / "checkpoint.pt"
    ddpm(images, 1, checkpoint=path)
    message = r"was made with other settings: batch_size = 16 \(now 8\), seed = 0 \(now 7\); use --fresh"
    with pytest.raises(common.CheckpointError, match=message):
        ddpm(images, 2, dataclasses.replace(DDPM, seed=7, batch_size=8), checkpoint=path)
    with pytest.raises(common.CheckpointError, match=r"example = 'ddpm' \(now 'gan'\)"):
        gan(images, 2, checkpoint=path)
    ddpm(images, 1, dataclasses.replace(DDPM, seed=7), checkpoint=path, fresh=True)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(common.CheckpointError, match="no checkpoint that can be read"):
        common.load_checkpoint(path, {})


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    common.save_checkpoint(path, {"settings": {}, "step": 1})

    def interrupted(content, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        common.save_checkpoint(path, {"settings": {}, "step": 2})
    assert common.load_checkpoint(path, {})["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


# ---- sampling -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(images):
    return ddpm(images, 100)


def test_sampling_agrees_between_backends(trained):
    seeds = common.sample_seeds(0, 4)
    with fastgen.use_backend("eager"):
        eager = train_ddpm.sample(trained.model, trained.schedule, seeds)
    # Noise agrees to 1e-6 and a step to a few float32 roundings; the network passes differences on through 50 steps. Images
    # are within −1 … 1 and a grey level is 8e-3 wide.
    automatic = train_ddpm.sample(trained.model, trained.schedule, seeds)
    torch.testing.assert_close(automatic, eager, rtol=0, atol=2e-5)
    assert eager.std() > 0.1


def test_training_agrees_between_backends(images, trained):
    """A hundred losses; on one machine they differed by 3e-7, a few units of float32's last place."""
    with fastgen.use_backend("eager"):
        eager = ddpm(images, 100)
    # Not weight by weight: Adam divides a gradient by its own size, so where it is all rounding so is the step
    torch.testing.assert_close(torch.tensor(eager.losses), torch.tensor(trained.losses), rtol=1e-5, atol=0)


def test_gan_training_curves_agree_between_backends(images):
    """The fused losses and plain PyTorch from the same seed: 100 steps of both networks."""
    curves = []
    for backend in (None, "eager"):
        with fastgen.use_backend(backend):
            losses = gan(images, 100, dataclasses.replace(GAN, k=1)).losses
        curves.append(torch.tensor([[loss["discriminator"], loss["generator"]] for loss in losses]))
    fused, eager = curves
    assert eager.std(0).min() > 0.02  # something was learned
    # Each step passes on the rounding of the one before, and what remains of it in these curves has been 2e-7 at most, three
    # units in the last place, for three seeds and k = 1 and 2; ten times that leaves room for other processors.
    torch.testing.assert_close(fused, eager, rtol=2e-6, atol=0)


def test_a_sample_does_not_depend_on_the_samples_beside_it(trained):
    seeds = common.sample_seeds(0, 5)
    schedule = trained.schedule.respace(10)
    together = train_ddpm.sample(trained.model, schedule, seeds)
    alone = train_ddpm.sample(trained.model, schedule, seeds[3:4])
    # the noise is bit-equal; convolutions round differently for another batch size
    torch.testing.assert_close(together[3:4], alone, rtol=0, atol=2e-5)
    assert together.shape == (5, 1, 8, 8)
    assert together.abs().max() <= 1  # the last step returns the clipped x0


def test_a_checkpoint_is_loaded_for_sampling(images, tmp_path):
    path = tmp_path / "checkpoint.pt"
    trained = ddpm(images, 2, checkpoint=path)
    model, schedule = train_ddpm.load(path)
    assert schedule == trained.schedule and not model.training
    for name, value in weights(trained).items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    gan(images, 1, checkpoint=path, fresh=True)
    with pytest.raises(common.CheckpointError, match="is another example's checkpoint; train_ddpm.py makes one"):
        train_ddpm.load(path)


def test_shares_of_the_samples_are_in_order():
    for count, world_size in [(64, 2), (5, 2), (5, 3), (2, 4)]:
        shares = [range(count)[sample_distributed.share(count, rank, world_size)] for rank in range(world_size)]
        assert [i for share in shares for i in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_distributed_samples_are_bit_equal_whatever_the_split():
    model, schedule = sample_distributed.random_model(0, "cpu")
    seeds = common.sample_seeds(0, 7)
    make = lambda part: sample_distributed.sample(model, schedule, part, steps=3, batch_size=2)  # noqa: E731
    together = make(seeds)
    assert together.shape == (7, 1, 8, 8) and together.std() > 0.1
    assert torch.equal(torch.cat([make(seeds[:3]), make(seeds[3:3]), make(seeds[3:])]), together)


def test_the_robots_loop_by_hand_is_fastgens():
    schedule, policy = fastgen.Schedule.cosine(20), robot_policy.Policy().eval()
    observation = torch.linspace(-1, 1, robot_policy.OBSERVATION).unsqueeze(0)
    noise = lambda t: fastgen.randn(robot_policy.SHAPE, seed=3, offset=t)  # noqa: E731
    with torch.no_grad():
        expected = robot_policy.ByHand(schedule, "cpu")(policy, observation, noise)
    made = fastgen.sample(policy, robot_policy.SHAPE, schedule, clip=1.0, seed=3, model_kwargs={"observation": observation})
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)


def test_a_reward_is_raised():
    model, schedule = sample_distributed.random_model(0, "cpu")
    settings = reinforce.Settings(samples=24, batch_size=32)
    rewards = list(reinforce.reinforce(model, schedule.respace(5), reinforce.REWARDS["bright"], settings, 5))
    assert rewards[0] == pytest.approx(0.5, abs=0.05)
    assert rewards[-1] > rewards[0] + 0.1, rewards


def test_a_chain_is_that_of_sample():
    model, schedule = sample_distributed.random_model(0, "cpu")
    short, seeds = schedule.respace(4), common.sample_seeds(0, 3)
    images, steps = reinforce.chain(model, short, seeds)
    expected = fastgen.sample(model, (3, *common.IMAGE_SHAPE), short, sample_seeds=seeds, **reinforce.STEP)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert [int(t[0]) for _, _, t, _ in steps] == [3, 2, 1]


def test_gan_samples(images):
    generator = gan(images, 1).generator
    seeds = common.sample_seeds(0, 5)
    together = train_gan.sample(generator, seeds)
    torch.testing.assert_close(together[2:3], train_gan.sample(generator, seeds[2:3]), rtol=0, atol=1e-5)


def test_grid(tmp_path):
    images = torch.full((3, 1, 2, 2), -1.0)
    images[1], images[2, 0, 0, 1] = 1.0, 3.0
    common.write_grid(images, tmp_path / "new" / "grid.png", columns=2, scale=2)
    picture = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert picture.shape == (14, 14)  # 2 rows and columns of 2 pixels and a gap, all twice as wide, and the last gap
    assert np.all(picture[2:6, 2:6] == 0)
    assert np.all(picture[2:6, 8:12] == 255)
    assert np.all(picture[8:10, 4:6] == 255)
    assert np.all(picture[8:12, 8:12] == 64)
    common.write_grid(torch.zeros(2, 3, 4, 4), tmp_path / "colour.png")
    assert Image.open(tmp_path / "colour.png").mode == "RGB"


# ---- the demo's numbers ---------------------------------------------------------------------------------------------------


def test_frechet_distance_of_known_gaussians():
    x = np.random.default_rng(0).standard_normal((500, 4)) @ np.diag([1.0, 2.0, 3.0, 0.0])
    assert demo.frechet_distance(x, x) == pytest.approx(0.0, abs=1e-6)
    shift = np.array([3.0, 0.0, 0.0, 4.0])
    assert demo.frechet_distance(x, x + shift) == pytest.approx(25.0, abs=1e-6)
    # √(C·4C) = 2C, so what is left of C + 4C − 2·2C is C
    assert demo.frechet_distance(x, 2 * x) - np.sum(x.mean(0) ** 2) == pytest.approx(np.trace(np.cov(x.T)), rel=1e-6)


def test_the_handwritten_steps_compute_what_fastgen_computes(monkeypatch):
    schedule = fastgen.Schedule.linear(1000)
    by_hand = demo.HandWritten(schedule)
    generator = torch.Generator().manual_seed(0)
    x, m, z = torch.randn((3, 5, 1, 4, 4), generator=generator)
    t = torch.tensor([0, 1, 17, 500, 999])
    monkeypatch.setattr(torch, "randn_like", lambda x: z)
    # at t = 999, x0 = 159·x − 159·m loses digits before it is clipped
    expected = fastgen.ddpm_step(x, m, t, schedule, clip=1.0, noise=z)
    torch.testing.assert_close(by_hand.ddpm_step(x, m, t), expected, rtol=0, atol=5e-5)
    torch.testing.assert_close(by_hand.q_sample(x, t), fastgen.q_sample(x, t, schedule, noise=z), rtol=0, atol=2e-6)


# ---- command lines --------------------------------------------------------------------------------------------------------

TINY_PERCEPTRON = ["--steps", "2", "--batch-size", "8", "--samples", "4"]
TINY_TRAINING = [*TINY_PERCEPTRON, "--base-channels", "8"]
TINY_LIKELIHOOD = ["--timesteps", "5", "--held-out", "6", "--digits", "2", "--trajectories", "3"]
TINY_DEMO = ["--steps", "2", "--samples", "40", "--sampling-steps", "2", "--base-channels", "8", "--timing-rounds", "1"]


TINY_SAMPLING = ["--random", "--samples", "5", "--batch-size", "2", "--sampling-steps", "3"]
NO_GLOO = not (torch.distributed.is_available() and torch.distributed.is_gloo_available())


def _script(name, root, out=None):
    return [str(EXAMPLES / f"{name}.py"), "--out", str(root / (out or name))]


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """(exit status, output, directory) of every script, run side by side."""
    root = tmp_path_factory.mktemp("commands")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    scripts = {
        "train_ddpm": [*_script("train_ddpm", root), *TINY_TRAINING, "--timesteps", "5", "--backend", "eager"],
        "train_gan": [*_script("train_gan", root), *TINY_TRAINING, "--k", "2"],
        "train_vae": [*_script("train_vae", root), *TINY_PERCEPTRON, "--draws", "3"],
        "likelihood": [*_script("likelihood", root), *TINY_TRAINING, *TINY_LIKELIHOOD],
        "demo": [*_script("demo", root), *TINY_DEMO],
        "sample_distributed": [*_script("sample_distributed", root), *TINY_SAMPLING],
        "reinforce": [*_script("reinforce", root), "--random", "--rounds", "2", "--samples", "4", "--steps", "3"],
        "robot_policy": [str(EXAMPLES / "robot_policy.py"), "--rounds", "2", "--steps", "3"],
    }
    if not NO_GLOO:
        scripts["torchrun"] = [*torchrun, *_script("sample_distributed", root, "torchrun"), *TINY_SAMPLING]
    python_path = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH")]))
    # without a limit each of the processes would use every core
    environment = {**os.environ, "PYTHONPATH": python_path, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    running = {}
    for name, arguments in scripts.items():
        running[name] = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            env=environment,
            cwd=root,
        )
    outputs = {name: process.communicate(timeout=300)[0] for name, process in running.items()}
    return {name: (running[name].returncode, outputs[name], root / name) for name in scripts}


def check_command(command, words, files):
    """It printed the words, and left the checkpoint and these pictures."""
    status, output, directory = command
    assert status == 0, output
    for each in words:
        assert each in output, output
    assert sorted(path.name for path in directory.iterdir()) == ["checkpoint.pt", *files]
    for name in files:
        Image.open(directory / name).verify()


@pytest.mark.parametrize("name", ["train_ddpm", "train_gan"])
def test_training_commands_write_the_grid_and_the_checkpoint(name, commands):
    check_command(commands[name], ["2 training steps; 4 samples in"], ["samples.png"])


def test_vae_command_prints_both_bounds(commands):
    words = (
        "2 training steps; 4 samples in",
        "evidence lower bound of 360 held-out digits: -",
        "E_q log p(x | z) -",
        "importance-weighted bound from 3 draws each: -",
    )
    check_command(commands["train_vae"], words, ["reconstructions.png", "samples.png"])
    directory = commands["train_vae"][2]
    assert Image.open(directory / "reconstructions.png").size == Image.open(directory / "samples.png").size


def test_likelihood_command_prints_bound_and_estimate(commands):
    words = (
        "2 training steps",
        "variational bound of 6 held-out digits: ",
        "L_1 … L_T−1",
        "grey levels of 255",
        "−log p of 2 of them, from 3 trajectories each, in bits per dimension:",
        "terms and rate–distortion in",
    )
    check_command(commands["likelihood"], words, ["samples.png", "terms.png"])


def test_demo_command_prints_its_tables(commands):
    words = (
        "Trained 2 steps now, 2 in all",
        "Fréchet distance",
        "noise (the ceiling)",
        "training digits (the floor)",
        "ddpm_step  (8, 3, 256, 256)",
        "ratio",
    )
    check_command(commands["demo"], words, ["digits.png"])


@pytest.mark.skipif(NO_GLOO, reason="this torch has no gloo")
def test_sampling_commands_print_the_same_digest(commands):
    """One process, and two under torchrun that share five samples."""
    digests = []
    for name, processes in (("sample_distributed", "1 process"), ("torchrun", "2 processes")):
        status, output, directory = commands[name]
        assert status == 0, output
        assert f"5 samples of {processes} in" in output
        digests.append(output.split("sha256 ")[1].split()[0])
        Image.open(directory / "samples.png").verify()
    assert digests[0] == digests[1] and len(digests[0]) == 64


def test_reinforce_command_prints_rewards(commands):
    status, output, directory = commands["reinforce"]
    assert status == 0, output
    assert "round 0: reward 0." in output and "round 1: reward 0." in output
    assert sorted(path.name for path in directory.iterdir()) == ["after.png", "before.png"]


def test_robot_policy_command_prints_its_table(commands):
    status, output, _ = commands["robot_policy"]
    assert status == 0, output
    for words in ("the network alone", "fastgen.Sampler", "plain PyTorch", "3 steps, actions (1, 16, 7), 1 thread(s)", "per step"):
        assert words in output


def test_commands_say_what_is_wrong_in_one_line(commands):
    directory = commands["train_ddpm"][2]

    def run(*arguments):
        common.run_main(lambda: train_ddpm.main([*TINY_TRAINING, "--timesteps", "5", "--out", str(directory), *arguments]))

    with pytest.raises(SystemExit, match="^error: .*batch_size = 8 .now 9."):
        run("--batch-size", "9")
    with pytest.raises(SystemExit, match="^error: .*'triton' is not available"):
        if "triton" in fastgen.available_backends("cpu"):
            pytest.skip("Triton runs on the CPU here")
        run("--backend", "triton")
    with pytest.raises(SystemExit, match="2"):
        run("--steps", "0")
    missing = ["--checkpoint", str(directory / "none.pt"), "--out", str(directory)]
    with pytest.raises(SystemExit, match="^error: .*none.pt does not exist; train_ddpm.py makes one, or use --random"):
        common.run_main(lambda: sample_distributed.main(missing))
    with pytest.raises(SystemExit, match="^error: --sampling-steps: the schedule has 1000, got 1001"):
        common.run_main(lambda: sample_distributed.main(["--random", "--sampling-steps", "1001"]))
