"""What validation says of pictures: edges, distances of features. Against float64, and by the order of altered ones."""

import pytest
import torch
import torch.nn.functional as F


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
        _, shared, full = lcm.compare_pairs(pictures, plain).mean(dim=0).tolist()
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


def test_pairs_are_compared_as_by_hand_whatever_the_chunk(lcm):
    a, b = drawings(5, 12), noised(drawings(5, 12), 0.2)
    found = lcm.compare_pairs(a, b)
    for index, (x, y) in enumerate(zip(a.double().numpy(), b.double().numpy(), strict=True)):
        rows, columns = y[:, 1:] - y[:, :-1], y[:, :, 1:] - y[:, :, :-1]
        shared = ((x[:, 1:] - x[:, :-1]) * rows).mean() + ((x[:, :, 1:] - x[:, :, :-1]) * columns).mean()
        assert found[index, 1:].tolist() == pytest.approx([shared, (rows**2).mean() + (columns**2).mean()], rel=1e-4)
        assert 10 ** (-found[index, 0].item() / 10) == pytest.approx(((x - y) ** 2).mean(), rel=1e-4)
    for chunk in (1, 3, 5):
        torch.testing.assert_close(lcm.compare_pairs(a, b, chunk), found)
