"""Training learns, is repeatable to the bit across a kill, and never loses its last good state."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from slimdit.files import read_tensors
from slimdit.models.dit import DiT, uniform
from slimdit.sampling.process import NoiseProcess
from slimdit.training.data import ArrayImages
from slimdit.training.loop import Batch, TrainConfig, TrainState, denoising_loss, descend, draw_batches, train

QUICK = TrainConfig(steps=6, batch=8, learning_rate=1e-3, precision="fp32", ema=0.9, checkpoint_every=2, log_every=2)


def tiny_model(seed: int = 0, **options) -> DiT:
    torch.manual_seed(seed)
    settings = {"depth": 1, "width": 32, "heads": 2, "patch": 4, "input_size": (8, 8), "channels": 1, "classes": 3}
    return DiT(uniform(**{**settings, **options}))


def tiny_data(images: int = 20, flip: bool = True) -> ArrayImages:
    """Three classes: dark, middling and bright, with a little noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(images) % 3
    pixels = (labels[:, None, None, None] * 100 + rng.integers(0, 40, (images, 1, 8, 8))).astype(np.uint8)
    return ArrayImages(pixels, labels, flip=flip)


def run(folder: Path, config: TrainConfig = QUICK, **options) -> DiT:
    return train(tiny_model(), NoiseProcess(), tiny_data(), config, folder, device="cpu", **options)


def weights(model: DiT) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different


def curve(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def file_content(folder: Path) -> tuple[dict, bytes]:
    """A checkpoint's header and bytes; the header parsed, since safetensors writes metadata in no fixed order."""
    raw = (folder / "checkpoint.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def test_draws_come_again_where_asked():
    config, model = replace(QUICK, repeat=3), tiny_model()
    batches = draw_batches(model, NoiseProcess(), tiny_data(), config, 0, 0, 1)
    drawn = [next(batches) for _ in range(7)]
    resumed = next(draw_batches(model, NoiseProcess(), tiny_data(), config, 5, 0, 1))
    for early, late in ((drawn[0], drawn[3]), (drawn[2], drawn[5]), (drawn[2], resumed), (drawn[0], drawn[6])):
        for name in ("clean", "labels", "noise", "t"):
            assert torch.equal(getattr(early, name), getattr(late, name))
    assert not torch.equal(drawn[0].noise, drawn[1].noise) and [batch.step for batch in drawn] == list(range(7))


# learning


def test_the_loss_falls_and_is_reported(tmp_path):
    heard = []
    config = replace(QUICK, steps=80, batch=32, learning_rate=3e-3, log_every=20, checkpoint_every=80)
    run(tmp_path, config, report=heard.append)
    losses = [line["loss"] for line in curve(tmp_path)]
    assert losses[-1] < 0.75 * losses[0]
    assert [progress.step for progress in heard] == [20, 40, 60, 80]
    assert [progress.loss for progress in heard] == losses
    assert heard[-1].images == 80 * 32 and heard[-1].images_per_second > 0


def test_the_same_seed_is_the_same_model_to_the_bit_and_another_is_not(tmp_path):
    first = weights(run(tmp_path / "a"))
    assert_equal(first, weights(run(tmp_path / "b")))
    assert file_content(tmp_path / "a") == file_content(tmp_path / "b")
    other = weights(run(tmp_path / "c", replace(QUICK, seed=1)))
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_bf16_computes_in_bfloat16_and_leaves_a_float32_model_as_it_was(tmp_path):
    seen = []

    def loss(model, batch):
        out = model(batch.clean, batch.t, batch.labels)
        seen.append((torch.is_autocast_enabled("cpu"), out.dtype))
        return (out[:, :1] - batch.noise).square().flatten(1).mean(1)

    half = run(tmp_path / "bf16", replace(QUICK, precision="bf16"), loss=loss)
    full = run(tmp_path / "fp32", loss=loss)
    assert set(seen) == {(False, torch.float32)}  # the model alone is in bfloat16, its answer and the loss are not
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert "forward" not in vars(half) and not half.training
    differences = [float((a - b).detach().abs().max()) for a, b in zip(half.parameters(), full.parameters())]
    assert 0 < max(differences) < 0.05


def test_min_snr_weighs_the_error_by_the_clamped_signal_to_noise_ratio():
    process, t = NoiseProcess(), torch.tensor([0, 100, 300, 999])
    torch.manual_seed(0)
    clean, noise = torch.rand(4, 1, 8, 8) * 2 - 1, torch.randn(4, 1, 8, 8)
    batch = Batch(clean, torch.zeros(4, dtype=torch.int64), noise, t)

    def silent(x, t, y):
        return torch.zeros_like(x)

    plain = denoising_loss(process)(silent, batch)
    weighed = denoising_loss(process, "min_snr")(silent, batch)
    kept = process.alphas_cumprod[t]
    snr = kept / (1 - kept)
    assert torch.allclose(plain, noise.square().flatten(1).mean(1))
    # 1e-3: the loss is float32, in which 1 - 0.9999 at t = 0 has three digits.
    assert torch.allclose((weighed / plain).double(), torch.minimum(snr, torch.tensor(5.0)) / snr, rtol=1e-3)
    assert snr[0] > 5 > snr[3]


# rates and averages


def test_rates_warm_up_and_fall_as_a_cosine():
    config = TrainConfig(steps=110, learning_rate=2.0, warmup=10, schedule="cosine", final_rate=0.1)
    assert [config.rate(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert [config.rate(step) for step in (10, 60, 110)] == pytest.approx([2.0, 1.1, 0.2])
    falling = [config.rate(step) for step in range(10, 110)]
    assert falling == sorted(falling, reverse=True)
    assert {TrainConfig(steps=110, learning_rate=2.0, warmup=10).rate(step) for step in range(10, 110)} == {2.0}


def test_the_optimizer_gets_the_rates(tmp_path, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def listening(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", listening)
    config = replace(QUICK, warmup=3, schedule="cosine")
    run(tmp_path, config)
    assert rates == [config.rate(step) for step in range(6)]


def test_the_average_is_the_exponential_one_with_its_warm_up():
    model = tiny_model()
    config = replace(QUICK, ema=0.5)
    state = TrainState(model, torch.optim.AdamW(model.parameters()), config)
    parameter = model.final_layer.linear.bias
    expected = parameter.detach().clone().double()
    for step in range(12):
        with torch.no_grad():
            parameter.fill_(float(step))
        state.average(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert torch.allclose(state.ema["final_layer.linear.bias"].double(), expected, rtol=1e-6)
    state.take_average()
    assert torch.equal(parameter, state.ema["final_layer.linear.bias"])


def test_the_model_returned_has_the_averaged_weights_of_the_checkpoint(tmp_path):
    model = run(tmp_path)
    tensors, metadata = read_tensors(tmp_path / "checkpoint.safetensors")
    assert metadata["step"] == "6"
    averaged = weights(model)
    assert_equal(averaged, {name: tensors[f"ema.{name}"] for name in averaged})
    assert any(not torch.equal(averaged[name], tensors[f"model.{name}"]) for name in averaged)


# batches


def batches(count: int, start: int = 0, rank: int = 0, ranks: int = 1, model: DiT | None = None,
            config: TrainConfig = QUICK) -> list[Batch]:
    drawn = draw_batches(model or tiny_model(), NoiseProcess(), tiny_data(), config, start, rank, ranks)
    return [next(drawn) for _ in range(count)]


def test_a_batch_does_not_depend_on_where_the_run_began():
    def tensors(batch):
        return {name: torch.as_tensor(value) for name, value in vars(batch).items()}

    whole = batches(8)  # 64 images: more than three epochs
    for start in (1, 3, 7):
        for left, right in zip(whole[start:], batches(8 - start, start)):
            assert_equal(tensors(left), tensors(right))


def test_an_epoch_shows_every_image_once_in_another_order_each_time():
    class Indices:
        shape, classes = (1, 8, 8), 3

        def __len__(self) -> int:
            return 20

        def batch(self, indices, generator):
            return torch.zeros(len(indices), 1, 8, 8), indices

    model = tiny_model(label_dropout=0.0)
    drawn = draw_batches(model, NoiseProcess(), Indices(), replace(QUICK, batch=5), 0, 0, 1)
    epochs = [torch.cat([next(drawn).labels for _ in range(4)]).tolist() for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]


def test_processes_share_a_batch_without_overlap():
    config = replace(QUICK, batch=20)
    model = tiny_model(label_dropout=0.0)
    halves = [batches(1, rank=rank, ranks=2, model=model, config=config)[0] for rank in (0, 1)]
    whole = batches(1, model=model, config=config)[0]
    assert torch.equal(torch.cat([half.labels for half in halves]), whole.labels)
    assert not torch.equal(halves[0].noise, halves[1].noise)


def test_labels_are_dropped_to_the_null_class_as_often_as_the_model_says():
    config = replace(QUICK, batch=1000)
    labels = torch.cat([batch.labels for batch in batches(4, model=tiny_model(label_dropout=0.25), config=config)])
    share = float((labels == 3).float().mean())
    assert share == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 4000) ** 0.5)
    assert not (batches(1, model=tiny_model(label_dropout=0.0), config=config)[0].labels == 3).any()


def test_timesteps_and_noise_cover_the_process():
    batch = batches(1, config=replace(QUICK, batch=4000))[0]
    assert 0 <= int(batch.t.min()) < 10 and 990 <= int(batch.t.max()) < 1000
    assert float(batch.noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(batch.noise.std()) == pytest.approx(1, abs=0.01)


# stopping and going on

SCRIPT = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import torch
    torch.set_num_threads(1)
    from test_loop import QUICK, replace, tiny_data, tiny_model, train, NoiseProcess
    folder, resume, pause = Path(sys.argv[2]), sys.argv[3] == "resume", float(sys.argv[4])

    def report(progress):
        print(progress.step, flush=True)
        time.sleep(pause)

    config = replace(QUICK, steps=40, checkpoint_every=7, log_every=3, warmup=5, schedule="cosine")
    try:
        train(tiny_model(), NoiseProcess(), tiny_data(), config, folder, device="cpu", resume=resume, report=report)
    except KeyboardInterrupt as stop:
        print("interrupted:", stop, flush=True)
        sys.exit(130)
""")


def start_run(folder: Path, resume: str = "new", pause: float = 0.0) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(folder), resume, str(pause)],
                            stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(running: subprocess.Popen, step: int) -> None:
    """Read reports until one is at or after a step."""
    assert running.stdout
    for line in running.stdout:
        if line.strip().isdigit() and int(line) >= step:
            return
    pytest.fail(f"the run ended before step {step}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    running = start_run(folder)
    running.communicate(timeout=300)
    assert running.returncode == 0
    return folder


def test_a_run_killed_and_resumed_is_the_uninterrupted_run_to_the_bit(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    running = start_run(folder, pause=0.05)
    wait_for(running, 18)  # past the checkpoint of step 14, with lines that the resumed run must write again
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert running.stdout
    running.stdout.close()
    step = int(read_tensors(folder / "checkpoint.safetensors")[1]["step"])
    assert 14 <= step < 40 and curve(folder)[-1]["step"] > step

    again = start_run(folder, "resume")
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0
    assert int(out.split()[0]) > step
    assert file_content(folder) == file_content(uninterrupted)
    assert [line["step"] for line in curve(folder)] == [line["step"] for line in curve(uninterrupted)]
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.safetensors", "curve.jsonl"]


def test_ctrl_c_writes_a_checkpoint_of_the_step_it_ended_and_says_how_to_go_on(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    running = start_run(folder, pause=0.2)
    wait_for(running, 9)
    time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    out, _ = running.communicate(timeout=300)
    assert running.returncode == 130
    step = int(read_tensors(folder / "checkpoint.safetensors")[1]["step"])
    assert 9 <= step < 40
    assert f"interrupted: stopped after step {step} of 40: add --resume to go on from {folder}" in out

    again = start_run(folder, "resume")
    again.communicate(timeout=300)
    assert again.returncode == 0
    assert file_content(folder) == file_content(uninterrupted)


def test_ctrl_c_is_given_back_after_training(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run(tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_can_be_made_longer(tmp_path):
    run(tmp_path / "short", replace(QUICK, steps=4))
    longer = run(tmp_path / "short", QUICK, resume=True)
    assert_equal(weights(longer), weights(run(tmp_path / "long")))


def test_a_finished_run_resumes_to_its_own_result(tmp_path):
    first = weights(run(tmp_path))
    assert_equal(weights(run(tmp_path, resume=True)), first)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run(tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="add --resume"):
        run(tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_another_runs_checkpoint_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="belongs to another run: learning_rate, seed changed"):
        run(tmp_path, replace(QUICK, learning_rate=1e-4, seed=5), resume=True)
    with pytest.raises(ValueError, match="the model's structure changed"):
        train(tiny_model(depth=2), NoiseProcess(), tiny_data(), QUICK, tmp_path, device="cpu", resume=True)


def test_a_checkpoint_from_before_a_config_had_an_option_is_still_resumed(tmp_path):
    from slimdit.files import write_tensors

    first = weights(run(tmp_path))
    tensors, metadata = read_tensors(tmp_path / "checkpoint.safetensors")
    model = json.loads(metadata["model"])
    del model["linears"]
    write_tensors(tmp_path / "checkpoint.safetensors", tensors, {**metadata, "model": json.dumps(model)})
    assert_equal(weights(run(tmp_path, resume=True)), first)


def test_a_truncated_checkpoint_is_a_sentence(tmp_path):
    run(tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, log_every):
    steps = iter(range(100))

    def exploding(model, batch):
        values = denoising_loss(NoiseProcess())(model, batch)
        return values * float("nan") if next(steps) == 4 else values

    config = replace(QUICK, steps=10, log_every=log_every)
    with pytest.raises(ValueError, match=r"at step [56]: the state before it is kept in .*checkpoint\.safetensors"):
        run(tmp_path, config, loss=exploding)
    tensors, metadata = read_tensors(tmp_path / "checkpoint.safetensors")
    assert metadata["step"] == "4"
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_data_that_does_not_fit_the_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the data is 1x8x8 .* the model takes 3x8x8"):
        train(tiny_model(channels=3), NoiseProcess(), tiny_data(), QUICK, tmp_path, device="cpu")
    with pytest.raises(ValueError, match="the data has 3 classes, the model 2"):
        train(tiny_model(classes=2), NoiseProcess(), tiny_data(), QUICK, tmp_path, device="cpu")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("change", "sentence"), [
    ({"steps": 0}, "steps must be at least 1"),
    ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
    ({"clip": 0.0}, "clip must be above 0"),
    ({"warmup": -1}, "warmup must be 0 or more"),
    ({"ema": 1.0}, "ema must be in 0..1"),
    ({"schedule": "linear"}, "schedule 'linear' is unknown; use constant, cosine"),
    ({"weighting": "snr"}, "weighting 'snr' is unknown; use none, min_snr"),
    ({"precision": "fp16"}, "precision 'fp16' is unknown; use auto, fp32, bf16"),
])
def test_numbers_out_of_range_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(QUICK, **change)


# many processes

MANY = textwrap.dedent("""
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import torch
    torch.set_num_threads(1)
    from accelerate import PartialState
    from test_loop import QUICK, NoiseProcess, tiny_data, tiny_model, train
    rank = PartialState(cpu=True).process_index
    model = tiny_model(seed=rank)  # each process begins elsewhere: they must end as one
    folder = Path(sys.argv[2])
    model = train(model, NoiseProcess(), tiny_data(), QUICK, folder / "run", device="cpu", resume=True)
    torch.save(model.state_dict(), folder / f"rank{rank}.pt")
""")


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    (tmp_path / "many.py").write_text(MANY)
    # What accelerate launch starts on several devices; on a CPU it would ask for MPI.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(tmp_path / "many.py"), str(Path(__file__).parent), str(tmp_path)]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_equal(*ranks)
    assert all(tensor.isfinite().all() for tensor in ranks[0].values())
    assert [line["step"] for line in curve(tmp_path / "run")] == [2, 4, 6]
    start = weights(tiny_model(seed=0))
    assert any(not torch.equal(ranks[0][name], start[name]) for name in start)


def test_descending_fits_a_small_layer_and_asks_for_the_loss_of_every_step():
    generator = torch.Generator().manual_seed(0)
    x, goal = torch.randn(64, 4, generator=generator), torch.randn(3, 4, generator=generator)
    layer, asked = torch.nn.Linear(4, 3), []

    def loss(step: int) -> torch.Tensor:
        asked.append(step)
        return (layer(x) - x @ goal.T).square().mean()

    with torch.no_grad():  # as methods call it
        descend(layer, loss, steps=200, rate=0.1)
    assert asked == list(range(200)) and loss(0) < 1e-3
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_descending_puts_weights_back_where_they_may_be():
    layer = torch.nn.Linear(2, 2)

    @torch.no_grad()
    def project() -> None:
        layer.weight[0] = 0

    descend(layer, lambda step: (layer(torch.ones(1, 2)) - 1).square().sum(), steps=3, rate=0.1, project=project)
    assert (layer.weight[0] == 0).all() and (layer.weight[1] != 0).all()
