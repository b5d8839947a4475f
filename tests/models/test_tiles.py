"""A VAE in tiles: diffusers' own for large pictures, nothing for small ones, and caches that know."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from visiontune.assemble.resources import tile
from visiontune.errors import UserError


def test_large_pictures_are_encoded_in_tiles_and_small_ones_as_ever():
    whole, tiled = tiny_model("sd"), tiny_model("sd")
    tile(tiled)
    side = tiled.vae.tile_sample_min_size
    rng = torch.Generator().manual_seed(0)
    small, large = (torch.rand(2, 3, n, n, generator=rng) * 2 - 1 for n in (side, 2 * side))
    with torch.no_grad():
        torch.testing.assert_close(tiled.moments(small), whole.moments(small), rtol=0, atol=1e-6)
        mean, std = tiled.moments(large).chunk(2, dim=1)
        own, log = torch.cat([tiled.vae._tiled_encode(row[None]) for row in large]).chunk(2, dim=1)
        torch.testing.assert_close((mean, std.log()), (own, log.clamp(-30, 20) / 2), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(mean, whole.moments(large).chunk(2, dim=1)[0])
        z = torch.randn(1, tiled.latent_channels, *(n // tiled.downsample for n in large.shape[-2:]))
        assert tiled.decode(z).shape == whole.decode(z).shape
        assert not torch.allclose(tiled.decode(z), whole.decode(z))
    assert tiled.fingerprint("vae") != whole.fingerprint("vae")
    assert tiled.fingerprint("text") == whole.fingerprint("text")


def test_a_vae_that_knows_no_tiles_is_refused():
    with pytest.raises(UserError, match=r"model\.vae_tiling: 'tiny-amused' has no VAE that works in tiles"):
        tile(tiny_model("amused"))
