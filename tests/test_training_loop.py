"""A run that was stopped is the run that was not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from cxr_diffusers.training.checkpoints import checkpoints
from cxr_diffusers.training.run import ShuffledForever
from helpers import TOY_UNET, assert_same, toy_unet, train_toy


def test_stopping_and_resuming_gives_the_same_numbers_to_the_bit(tmp_path):
    straight, weights = train_toy(tmp_path / "straight", 7)
    train_toy(tmp_path / "resumed", 3, lr_scheduler="constant_with_warmup")
    resumed, again = train_toy(tmp_path / "resumed", 7)
    assert straight == resumed and [line["step"] for line in resumed] == list(range(1, 8))
    assert_same(weights, again)


def test_so_does_accumulating_gradients(tmp_path):
    straight, weights = train_toy(tmp_path / "straight", 4, gradient_accumulation_steps=2, batch_size=2)
    train_toy(tmp_path / "resumed", 2, gradient_accumulation_steps=2, batch_size=2)
    resumed, again = train_toy(tmp_path / "resumed", 4, gradient_accumulation_steps=2, batch_size=2)
    assert straight == resumed
    assert_same(weights, again)


def test_kill_minus_nine_in_the_middle_costs_nothing_but_the_steps_since_the_checkpoint(tmp_path):
    straight, weights = train_toy(tmp_path / "straight", 12, save_every=3)
    script = f"""if True:
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from helpers import train_toy
        train_toy({str(tmp_path / "killed")!r}, 100_000, save_every=3)
    """
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list((tmp_path / "killed").glob("checkpoint-0000003")) and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    done = checkpoints(tmp_path / "killed")
    assert done, "it was killed before its first checkpoint"
    # whatever the run had reached, take it up from its first checkpoint, half-written ones beside it
    for later in done[1:]:
        later.rename(later.with_suffix(".tmp"))
    if done[0].name != "checkpoint-0000003":
        pytest.skip("the machine was too fast: the first checkpoint is gone")
    resumed, again = train_toy(tmp_path / "killed", 12, save_every=3)
    assert straight == resumed
    assert_same(weights, again)


def test_old_checkpoints_go_and_no_half_written_thing_stays(tmp_path):
    train_toy(tmp_path, 8, checkpoints_total_limit=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-0000006", "checkpoint-0000008"]
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / ".saving").exists()


def test_the_saved_weights_are_the_average_and_not_the_last(tmp_path):
    _, saved = train_toy(tmp_path, 4)
    last = load_file(checkpoints(tmp_path)[-1] / "model.safetensors")
    assert any(not torch.equal(saved[k], last[k]) for k in saved)


def test_the_learning_rate_warms_up(tmp_path):
    log, _ = train_toy(tmp_path, 5)
    rates = [line["lr"] for line in log]
    assert rates == sorted(rates) and rates[0] < rates[2] == rates[4] == pytest.approx(1e-3)


def test_the_loss_falls_on_a_few_images(tmp_path):
    log, _ = train_toy(tmp_path, 60, learning_rate=3e-3, save_every=1000)
    losses = [line["loss"] for line in log]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match="learning_rate"):
        train_toy(tmp_path, 50, learning_rate=1e30, max_grad_norm=1e30, lr_warmup_steps=0)


def test_every_image_comes_once_an_epoch_and_processes_share_them():
    whole = ShuffledForever(12, batch_size=2, seed=0)
    shares = [ShuffledForever(12, 2, 0, process_index=i, num_processes=2) for i in range(2)]
    epoch = [next(batches) for batches in [iter(whole)] for _ in range(6)]
    assert sorted(sum(epoch, [])) == list(range(12))
    iterators = [iter(share) for share in shares]
    together = [sum((next(it) for it in iterators), []) for _ in range(3)]
    assert sorted(sum(together, [])) == list(range(12))
    assert not set(next(iter(shares[0]))) & set(next(iter(shares[1])))


def test_batch_i_depends_on_the_seed_and_i_alone():
    straight = iter(ShuffledForever(13, 4, seed=5))
    expected = [next(straight) for _ in range(8)]
    for start in range(8):
        assert next(iter(ShuffledForever(13, 4, seed=5, start=start))) == expected[start]
    assert next(iter(ShuffledForever(13, 4, seed=6))) != expected[0]


def test_a_data_set_smaller_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="lower train.batch_size"):
        ShuffledForever(3, 4, seed=0)


def test_the_toy_has_dropout_where_the_run_does():
    assert TOY_UNET.get("dropout") is None and toy_unet(dropout=0.1).config.dropout == 0.1


def test_another_run_does_not_go_on_where_one_has_begun(tmp_path):
    train_toy(tmp_path, 2)
    with pytest.raises(ValueError, match="seed: 0, now 1"):
        train_toy(tmp_path, 4, seed=1)
    with pytest.raises(ValueError, match="width: None, now 16"):
        train_toy(tmp_path, 4, identity={"width": 16})
    train_toy(tmp_path, 4, save_every=1)


def test_a_run_stopped_after_its_last_checkpoint_still_leaves_its_model(tmp_path):
    _, weights = train_toy(tmp_path, 4)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    _, again = train_toy(tmp_path, 4)
    assert_same(weights, again)


def test_the_precision_of_the_recipe_takes_precedence_over_the_launcher(tmp_path, monkeypatch):
    straight, _ = train_toy(tmp_path / "float32", 2)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(True)
    rounded, _ = train_toy(tmp_path / "bf16", 2)
    AcceleratorState._reset_state(True)
    same, _ = train_toy(tmp_path / "no", 2, mixed_precision="no")
    AcceleratorState._reset_state(True)
    assert same == straight and rounded != straight
    assert rounded[1]["loss"] == pytest.approx(straight[1]["loss"], rel=0.05)


# rank 1's clock runs twice as fast as rank 0's
CLOCKS = """if True:
    import itertools, os, socket, sys, types
    import torch
    from cxr_diffusers.training import run
    from helpers import train_toy

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")
    children = []
    for rank in (0, 1):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        if not (child := os.fork()):
            looks = itertools.count(1)
            run.time = types.SimpleNamespace(monotonic=lambda: next(looks) * (0.1 + 0.1 * rank))
            end, path = run.Run.end, f"{sys.argv[1]}/{rank}.pt"
            run.Run.end = lambda self: (torch.save(self.model.module.state_dict(), path), end(self))
            train_toy(sys.argv[1], 10_000, max_seconds=2.0, lr_scheduler="linear", batch_size=2, save_every=10_000)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
"""


def test_the_clock_of_one_process_gives_all_the_learning_rate(tmp_path):
    tests = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests.parent}:{tests}"}
    done = subprocess.run(
        [sys.executable, "-c", CLOCKS, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert_same(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)))
