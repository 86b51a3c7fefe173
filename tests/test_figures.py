"""What validation says of pictures: edges, distances of features. Against float64, and by the order of altered ones."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LCM, LCM_LORA, ROOT, load_script, make_pipeline, over, read_metrics
from diffusers import AutoencoderKL
from PIL import Image


def drawings(count=24, size=32, seed=0):
    """Bars and boxes of random colours, in [0, 1]: (count, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.rand(count, 3, 1, 1, generator=generator).repeat(1, 1, size, size)
    for picture in pictures:
        for _ in range(6):
            (top, left), (height, width) = torch.randint(0, size, (2, 2), generator=generator)
            colour = torch.rand(3, 1, 1, generator=generator)
            picture[:, top : top + height // 2 + 2, left : left + width // 2 + 2] = colour
    return pictures


def blurred(pictures, sigma):
    kernel = torch.exp(-(torch.arange(-6.0, 7) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    wide = F.conv2d(F.pad(pictures, (6, 6, 6, 6), "replicate"), kernel, groups=3)
    return F.conv2d(wide, kernel.transpose(2, 3), groups=3)


def noised(pictures, sigma):
    return pictures + sigma * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(9))


def test_edges_fall_with_blur_rise_with_sharpening_and_are_not_raised_by_speckle(lcm):
    plain = drawings()

    def edges(pictures):
        _, shared, full = lcm.compare_pairs(255 * pictures, 255 * plain).mean(dim=0).tolist()
        return shared / full

    assert edges(plain) == pytest.approx(1)
    found = [edges(blurred(plain, sigma)) for sigma in (2, 1, 0.5)]
    assert found == sorted(found) and found[0] < 0.4 and found[-1] < 0.95
    found = [edges(plain + amount * (plain - blurred(plain, 1))) for amount in (0.3, 0.6)]
    assert 1.05 < found[0] < found[1]
    assert edges(noised(plain, 0.1)) == pytest.approx(1, abs=0.03)
    assert edges(noised(blurred(plain, 1), 0.1)) == pytest.approx(edges(blurred(plain, 1)), abs=0.03)
    assert edges(plain.roll(1, 3)) < 0.8 and edges(plain.roll(1, 0)) < 0.2
    assert edges(0.8 * plain + 0.1) == pytest.approx(0.8, abs=1e-4)


def test_pairs_are_compared_as_by_hand(lcm):
    a, b = drawings(5, 12), noised(drawings(5, 12), 0.2)
    found = lcm.compare_pairs(255 * a, 255 * b)
    for index, (x, y) in enumerate(zip(a.double().numpy(), b.double().numpy(), strict=True)):
        rows, columns = y[:, 1:] - y[:, :-1], y[:, :, 1:] - y[:, :, :-1]
        shared = ((x[:, 1:] - x[:, :-1]) * rows).mean() + ((x[:, :, 1:] - x[:, :, :-1]) * columns).mean()
        assert found[index, 1:].tolist() == pytest.approx([shared, (rows**2).mean() + (columns**2).mean()], rel=1e-4)
        assert 10 ** (-found[index, 0].item() / 10) == pytest.approx(((x - y) ** 2).mean(), rel=1e-4)


# -------------------------------------------------------------------------------------------------------- distances
@pytest.fixture(scope="module")
def vae(make_teacher):
    return AutoencoderKL.from_pretrained(make_teacher(make_pipeline), subfolder="vae").eval()


@pytest.fixture(scope="module")
def plain():
    """64 prompts × 4 seeds: the seeds of a prompt look alike."""
    pictures = drawings(256, 16)
    return (0.4 * pictures + 0.6 * pictures[::4].repeat_interleave(4, dim=0)).clamp(0, 1)


def to_bytes(pictures):
    return (pictures.clamp(0, 1) * 255).round().byte()


def by_hand(a, b, reference):
    """Fréchet and paired distance in NumPy: the root of Σ_a Σ_b by symmetric eigenvectors."""
    mean, std = reference.mean(axis=0), reference.std(axis=0) + 1e-8
    a, b, reference = ((features - mean) / std for features in (a, b, reference))
    values, vectors = np.linalg.eigh(reference.T @ reference)
    axes, paired = vectors[:, np.argsort(values)[::-1][:32]], np.sqrt(((a - b) ** 2).mean(axis=1)).mean()
    a, b = a @ axes, b @ axes
    (value, vector), other = np.linalg.eigh(np.cov(a.T)), np.cov(b.T)
    half = vector * np.sqrt(value.clip(0)) @ vector.T
    root = np.sqrt(np.linalg.eigvalsh(half @ other @ half).clip(0)).sum()
    return ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + np.trace(np.cov(a.T) + other) - 2 * root, paired


def distances(lcm, vae, plain, altered, seeds=4, groups=None):
    """The figures of `altered` as a student's pictures in one step, and the looks they come from."""
    looks = {("teacher", 50): lcm.vae_statistics(vae, to_bytes(plain), 50)}
    look = lcm.vae_statistics(vae, to_bytes(altered), 50)
    looks |= {(name, 1): look for name in lcm.LABELS}
    groups = groups or {"": range(len(plain) // seeds)}
    return lcm.feature_distances(looks, [1], groups, seeds), looks["teacher", 50].numpy(), look.numpy()


def test_vae_statistics_are_the_evaluations_whatever_the_chunk(lcm, tiny, vae, plain):
    tool, pictures = load_script(ROOT / "tools/evaluate.py"), to_bytes(plain[:6])
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    expected = tool.load_vae_statistics(tiny, "cpu")(images, None).double()
    for chunk in (1, 4, 6):
        found = lcm.vae_statistics(vae, pictures, chunk)
        assert found.dtype == torch.float64 and found.shape == (6, 2 * (8 + 16 + 16))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_distances_are_those_by_hand_and_the_evaluations(lcm, vae, plain):
    groups = {"": range(64), "few": range(60, 64)}
    found, a, b = distances(lcm, vae, plain, blurred(plain, 1), groups=groups)
    names = {f"{name}_{figure}_k1" for name in lcm.LABELS for figure in ("fd", "feature_distance")}
    wanted = {*names, "floor_fd", "floor_feature_distance"}
    assert found.keys() == {f"fidelity/{name}" for name in wanted} | {
        f"fidelity/{name}/few" for name in wanted if "fd" not in name}  # fmt: skip
    frechet, paired = by_hand(b, a, a)
    assert found["fidelity/student_fd_k1"] == pytest.approx(frechet, rel=1e-4, abs=2e-3)
    assert found["fidelity/student_feature_distance_k1"] == pytest.approx(paired, abs=1e-3)
    scaled = [(features[240:] - a.mean(axis=0)) / a.std(axis=0) for features in (a, b)]  # as all pictures are
    paired = np.sqrt(((scaled[0] - scaled[1]) ** 2).mean(axis=1)).mean()
    assert found["fidelity/target_feature_distance_k1/few"] == pytest.approx(paired, abs=1e-3)
    frechet, paired = by_hand(a[0::2], a[1::2], a)
    assert found["fidelity/floor_fd"] == pytest.approx(frechet / 2, rel=1e-4, abs=2e-3)
    assert found["fidelity/floor_feature_distance"] == pytest.approx(paired, abs=1e-3)
    pytest.importorskip("torchmetrics")
    tool = load_script(ROOT / "tools/evaluate.py")
    project = tool.principal_components(a)
    assert found["fidelity/student_fd_k1"] == pytest.approx(tool.frechet_distance(project(b), project(a)), rel=1e-3)


def test_the_floor_is_what_other_noise_gives(lcm, vae):
    """Of independent sets of as many pictures; with an odd number of seeds, too."""
    for seeds in (4, 5):
        found, *_ = distances(lcm, vae, *drawings(2 * 64 * seeds, 16).split(64 * seeds), seeds)
        assert found["fidelity/floor_fd"] == pytest.approx(found["fidelity/student_fd_k1"], rel=0.35)


def test_distances_grow_with_what_is_done_to_the_pictures(lcm, vae, plain):
    def both(altered):
        found, *_ = distances(lcm, vae, plain, altered)
        return [found[f"fidelity/student_{figure}_k1"] for figure in ("fd", "feature_distance")]

    assert both(plain) == [pytest.approx(0, abs=1e-3)] * 2
    for name, series in {
        "blurred": [blurred(plain, sigma) for sigma in (0.5, 1, 2)],
        "speckled": [noised(plain, sigma) for sigma in (0.05, 0.1, 0.2)],
        "sharpened": [plain + amount * (plain - blurred(plain, 1)) for amount in (0.5, 1, 2)],
        "faded": [plain + amount * (0.5 - plain) for amount in (0.1, 0.3, 0.6)],
    }.items():
        fd, paired = zip(*map(both, series), strict=True)
        assert list(fd) == sorted(fd) and list(paired) == sorted(paired) and fd[0] > 0.01, name


def test_few_pictures_give_no_frechet_distance_and_fewer_no_distance(lcm, vae, plain, monkeypatch):
    monkeypatch.setattr(torch.linalg, "svd", None)  # nor are their axes sought
    found, *_ = distances(lcm, vae, plain[:252], plain[:252])
    assert not [key for key in found if "fd" in key] and "fidelity/student_feature_distance_k1" in found
    found, *_ = distances(lcm, vae, plain[:8], plain[:8], seeds=1)
    assert {key.split("_")[0] for key in found} == {f"fidelity/{name}" for name in lcm.LABELS}  # no floor of one seed
    assert distances(lcm, vae, plain[:6], plain[:6], seeds=2)[0] == {}


def test_a_vae_that_overflows_gives_numbers_all_the_same(lcm, vae, plain):
    pictures = to_bytes(plain[:8])
    broken = AutoencoderKL.from_config(vae.config).eval()
    broken.encoder.mid_block.resnets[1].conv2.weight.data.fill_(torch.inf)
    look = lcm.vae_statistics(broken, pictures, 3)
    assert look.isfinite().all()
    found = lcm.feature_distances({(name, k): look for name in lcm.LABELS for k in (1, 50)}, [1], {"": range(4)}, 2)
    assert found["fidelity/student_feature_distance_k1"] == 0


@over([LCM, LCM_LORA, "train_ct"])
def test_validation_draws_and_prints_them(script, train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "LEAST_SET", 8)
    output = train(tmp_path, "--validation_steps", "1", "--max_train_steps", "1", "--num_validation_images", "2",
                   "--validation_num_inference_steps", "1")  # fmt: skip
    first, last = (line for line in read_metrics(output) if "lr" not in line)
    shown = capsys.readouterr().out.split("Fréchet distance")[-1]
    shown = re.findall(r"^  (\S.*?) +(-?[\d.]+)$", shown, re.MULTILINE)
    for name, label in script.LABELS.items():
        label += ", guided (2 evaluations a step)" * (name == "teacher" and script.METHOD.has_teacher)
        key = f"fidelity/{name}_fd_k1"
        assert (first[key] == last[key]) == (name in ("teacher", "untrained"))
        assert (label, f"{last[key]:.2f}") in shown
    assert ("teacher, other noise", f"{last['fidelity/floor_fd']:.2f}") in shown
