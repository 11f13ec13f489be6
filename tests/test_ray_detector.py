"""Detection in Ray workers: the callable class by itself, and in a local Ray."""

import numpy as np
import pytest
from PIL import Image

from cxr_diffusers.inference.ray_detector import RayDetector
from helpers import FEW_STEPS


@pytest.fixture
def model(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def paths(tmp_path):
    """Five images and a file that is none, the third."""
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 16), dtype=np.uint8)).save(path)
    paths[2].write_bytes(b"no image")
    return [str(path) for path in paths]


def test_rows_get_the_pipelines_map_and_score_or_an_error(pipeline, model, paths):
    detector = RayDetector(model, FEW_STEPS, device="cpu", dtype="float32")
    batch = detector({"path": np.array(paths, object), "patient": np.arange(6)})
    assert batch["anomaly_map"].shape == (6, 16, 16) and batch["anomaly_map"].dtype == np.float32
    assert list(batch["patient"]) == list(range(6)) and list(batch["path"]) == paths
    assert [bool(error) for error in batch["error"]] == [i == 2 for i in range(6)] and paths[2] in batch["error"][2]
    assert np.isnan(batch["anomaly_score"][2]) and not batch["anomaly_map"][2].any()
    for i in (0, 1, 3, 4, 5):
        output = pipeline(Image.open(paths[i]), output_type="np", **FEW_STEPS)
        np.testing.assert_allclose(batch["anomaly_map"][i], output.anomaly_map[0], atol=1e-5)
        assert batch["anomaly_score"][i] == pytest.approx(output.anomaly_score[0], abs=1e-5)


def test_a_batch_without_a_readable_file_has_the_same_columns(model, paths):
    detector = RayDetector(model, FEW_STEPS, device="cpu", dtype="float32")
    bad, good = (detector({"path": np.array([path], object)}) for path in (paths[2], paths[0]))
    assert bad.keys() == good.keys()
    assert all(bad[key].shape == good[key].shape and bad[key].dtype == good[key].dtype for key in good)


def test_a_local_ray_returns_every_row_once(model, paths):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    try:
        arguments = {"model": str(model), "call_kwargs": FEW_STEPS, "device": "cpu", "dtype": "float32"}
        rows = ray.data.from_items([{"path": path} for path in paths])
        rows = rows.map_batches(RayDetector, fn_constructor_kwargs=arguments, concurrency=1, batch_size=2).take_all()
    finally:
        ray.shutdown()
    assert sorted(row["path"] for row in rows) == paths
    here = RayDetector(**arguments)({"path": np.array(paths, object)})
    scores = {row["path"]: row["anomaly_score"] for row in rows}
    np.testing.assert_allclose([scores[path] for path in paths], here["anomaly_score"], atol=1e-5)
    assert {row["anomaly_map"].shape for row in rows} == {(16, 16)}
