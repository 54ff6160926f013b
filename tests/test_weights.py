"""GoogLeNet_Weights: the enum, its preprocessing, and the download."""

import copy
import hashlib
import pickle

import pytest
import torch
from PIL import Image

import inception_ext
from inception_ext import GoogLeNet_Weights
from inception_ext.weights import ImageClassification

V1 = GoogLeNet_Weights.IMAGENET1K_V1


def test_facts_are_torchvisions(tv_googlenet):
    theirs = tv_googlenet.GoogLeNet_Weights.IMAGENET1K_V1
    assert V1.url == theirs.url
    ours, docs = dict(V1.meta), dict(theirs.meta)
    assert ours.pop("_docs") and docs.pop("_docs")
    assert ours == docs
    assert (repr(V1), str(V1)) == (repr(theirs), str(theirs))
    assert list(GoogLeNet_Weights.__members__) == list(type(theirs).__members__)


def test_categories():
    categories = V1.meta["categories"]
    assert len(categories) == 1000
    assert (categories[0], categories[207], categories[999]) == (
        "tench",
        "golden retriever",
        "toilet tissue",
    )


def test_default():
    assert GoogLeNet_Weights.DEFAULT is V1


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_members_are_singletons(clone):
    assert clone(V1) is V1


def test_verify(tv_googlenet):
    for given in (V1, "IMAGENET1K_V1", "DEFAULT", "GoogLeNet_Weights.DEFAULT"):
        assert GoogLeNet_Weights.verify(given) is V1
    assert GoogLeNet_Weights.verify(None) is None
    theirs = tv_googlenet.GoogLeNet_Weights.DEFAULT
    assert GoogLeNet_Weights.verify(theirs) is theirs


@pytest.mark.parametrize("given", ["IMAGENET1K_V2", "", "ResNet18_Weights.DEFAULT", "default"])
def test_unknown_names(tv_googlenet, given):
    for enum in (GoogLeNet_Weights, tv_googlenet.GoogLeNet_Weights):
        with pytest.raises(KeyError):
            enum.verify(given)


def test_other_objects(torchvision, tv_googlenet):
    for given in (3, object(), torchvision.models.ResNet18_Weights.DEFAULT):
        messages = []
        for enum in (GoogLeNet_Weights, tv_googlenet.GoogLeNet_Weights):
            with pytest.raises(TypeError) as caught:
                enum.verify(given)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


# Preprocessing


def random_image(height, width, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(height * width)
    if dtype.is_floating_point:
        return torch.rand(3, height, width, generator=generator).to(dtype)
    high = torch.iinfo(dtype).max
    return torch.randint(0, high, (3, height, width), generator=generator).to(dtype)


SIZES = [(300, 400), (500, 333), (256, 256), (224, 224), (100, 50), (257, 1000)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pil_images(tv_googlenet, size):
    image = Image.fromarray(random_image(*size).permute(1, 2, 0).contiguous().numpy())
    theirs = tv_googlenet.GoogLeNet_Weights.DEFAULT.transforms()(image)
    ours = V1.transforms()(image)
    assert ours.shape == (3, 224, 224) and ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.float32, torch.float64, torch.float16], ids=str
)
def test_tensors(tv_googlenet, size, dtype):
    image = random_image(*size, dtype)
    theirs = tv_googlenet.GoogLeNet_Weights.DEFAULT.transforms()(image)
    assert torch.equal(V1.transforms()(image), theirs)


def test_batches(tv_googlenet):
    images = torch.stack([random_image(300, 400), random_image(400, 300).mT])
    theirs = tv_googlenet.GoogLeNet_Weights.DEFAULT.transforms()(images)
    ours = V1.transforms()(images)
    assert ours.shape == (2, 3, 224, 224)
    assert torch.equal(ours, theirs)
    assert torch.equal(V1.transforms()(images[None, None])[0, 0], ours)


@pytest.mark.parametrize("sizes", [(299, 320), (128, 100), (96, 300)])
def test_other_sizes(tv_googlenet, sizes):
    kwargs = dict(zip(("crop_size", "resize_size"), sizes, strict=True))
    theirs = tv_googlenet.GoogLeNet_Weights.DEFAULT.transforms.func(**kwargs)
    for image in (random_image(301, 400), random_image(60, 47)):
        assert torch.equal(V1.transforms(**kwargs)(image), theirs(image))


def test_images_are_left_as_they_are():
    image = random_image(256, 256, torch.float32)
    before = image.clone()
    V1.transforms()(image)
    assert torch.equal(image, before)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16"])
def test_pil_images_in_other_modes(mode):
    with pytest.raises(ValueError, match=rf"in mode RGB but is in {mode}.*convert\('RGB'\)"):
        V1.transforms()(Image.new(mode, (300, 300)))


@pytest.mark.parametrize("shape", [(1, 30, 30), (30, 30), (30, 30, 3), (2, 4, 30, 30)])
def test_tensors_of_other_shapes(shape):
    with pytest.raises(ValueError, match=r"image should be \[\.\.\., 3, H, W\] but is"):
        V1.transforms()(torch.zeros(shape))


@pytest.mark.parametrize("image", [None, "photo.jpg", [[1]], b"\xff\xd8"], ids=str)
def test_other_things(image):
    with pytest.raises(TypeError, match="image should be a PIL image or a Tensor but is"):
        V1.transforms()(image)


def test_preset_is_printable_and_picklable():
    preset = pickle.loads(pickle.dumps(V1.transforms()))
    assert isinstance(preset, ImageClassification)
    assert "crop_size=224, resize_size=256" in repr(preset)


# Download


@pytest.fixture
def served(hub_dir, tmp_path, monkeypatch):
    """Serves a checkpoint from a file:// url in the place of the published one."""

    def serve(content=None, tag=None):
        state_dict = inception_ext.GoogLeNet(init_weights=False).state_dict()
        path = tmp_path / "served.pth"
        torch.save(state_dict, path)
        if content is not None:
            path.write_bytes(content)
        tag = tag or hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        path = path.rename(tmp_path / f"googlenet-{tag}.pth")
        monkeypatch.setattr(V1.value, "url", path.as_uri())
        return state_dict

    return serve


def test_download(served):
    state_dict = served()
    for _ in range(2):  # the second time from the cache
        model = inception_ext.googlenet(weights="DEFAULT", progress=False, aux_logits=True)
        for key, value in model.state_dict().items():
            assert torch.equal(value, state_dict[key]), key


def test_progress_bar(served, capfd):
    served()
    V1.get_state_dict(progress=True, check_hash=True)
    assert "100%" in capfd.readouterr().err


def test_wrong_hash(served):
    served(tag="00000000")
    with pytest.raises(RuntimeError, match="invalid hash value"):
        inception_ext.googlenet(weights="DEFAULT", progress=False)


def test_no_network(served, monkeypatch, tmp_path):
    monkeypatch.setattr(V1.value, "url", (tmp_path / "nothing-1378be20.pth").as_uri())
    with pytest.raises(OSError):
        inception_ext.googlenet(weights="DEFAULT", progress=False)
