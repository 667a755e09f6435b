import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from infoq_fx.errors import EncoderUnavailableError, OptionError
from infoq_fx.scoring.information.encoders import encode_inputs, load_dinov2, principal_components


def test_principal_components_are_scikit_learns_up_to_sign():
    x = torch.randn(50, 3, 4) * torch.tensor([5.0, 2.0, 1.0])[:, None]
    found = principal_components({"x": x}, components=4).numpy()
    expected = PCA(4, svd_solver="full").fit_transform(x.flatten(1).numpy())
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-3, atol=1e-3)


def test_many_samples_and_features_are_done_in_parts(monkeypatch):
    x = torch.randn(90, 3, 4) * torch.tensor([5.0, 2.0, 1.0])[:, None]
    expected = principal_components({"x": x}, components=4)
    monkeypatch.setattr("infoq_fx.scoring.information.encoders._PART_FEATURES", 5)
    torch.testing.assert_close(principal_components({"x": x}, components=4), expected, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr("infoq_fx.scoring.information.encoders._COMPONENT_SAMPLES", 60)
    fitted = PCA(4, svd_solver="full").fit(x[:60].flatten(1).numpy())
    found = principal_components({"x": x}, components=4).numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(fitted.transform(x.flatten(1).numpy())), rtol=1e-2, atol=1e-2)


def test_few_samples_have_few_components():
    assert principal_components({"x": torch.randn(5, 100)}).shape == (5, 4)


def test_a_callable_sees_batches_of_the_first_input():
    sizes = []

    def encoder(images):
        sizes.append(len(images))
        return images.flatten(1)[:, :2]

    inputs = {"x": torch.randn(10, 3, 3), "mask": torch.zeros(10)}
    features = encode_inputs(inputs, encoder, batch_size=4)
    assert torch.equal(features, inputs["x"].flatten(1)[:, :2])
    assert sizes == [4, 4, 2]


def test_an_encoder_that_loses_samples_is_refused():
    with pytest.raises(OptionError, match="5 rows for 10 samples"):
        encode_inputs({"x": torch.randn(10, 3)}, lambda x: x[::2])


def test_dinov2_offline_says_what_to_do(monkeypatch):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load", fail)
    with pytest.raises(EncoderUnavailableError, match=r"no network.*go online once.*leave encoder out"):
        load_dinov2()
    with pytest.raises(EncoderUnavailableError):
        encode_inputs({"x": torch.randn(4, 3, 28, 28)}, "dinov2")


def test_dinov2_resizes_to_whole_patches(monkeypatch):
    seen = []

    class Hub(torch.nn.Module):
        def forward(self, x):
            seen.append(tuple(x.shape[-2:]))
            return x.flatten(1)[:, :8]

    def load(repository, *_, **__):
        assert len(repository.partition(":")[2]) == 40
        return Hub()

    monkeypatch.setattr(torch.hub, "load", load)
    assert encode_inputs({"x": torch.randn(4, 3, 32, 224)}, "dinov2").shape == (4, 8)
    assert seen == [(98, 224)]
