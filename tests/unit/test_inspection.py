"""What `nnunet-xattnres inspect` is made of, without a model: files of cases, maps, slices, regions, pictures."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from matplotlib import style
from matplotlib.contour import ContourSet
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from PIL import Image
from scipy.spatial.transform import Rotation

from helpers.images import write_oblique_phantom
from helpers.routing import assert_no_texts_overlap, history_of
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.routing.drawing import CasePicture, draw_case
from nnunet_xattnres.routing.recording import CAVEAT
from nnunet_xattnres.tools.inspection import trained_model
from nnunet_xattnres.tools.inspection.image_files import find_cases
from nnunet_xattnres.tools.inspection.nifti import as_nifti
from nnunet_xattnres.tools.inspection.regions import Regions, on_boundary
from nnunet_xattnres.tools.inspection.slices import Slice
from nnunet_xattnres.tools.inspection.trained_model import shares


def test_weights_sum_to_one_whatever_half_precision_has_made_of_them():
    blended = (trained_model.BLENDING_SCALE * torch.rand(15, 4, 5)).half()
    each = list(shares(blended))
    assert {weights.dtype for weights in each} == {torch.float32}
    torch.testing.assert_close(sum(each), torch.ones(4, 5))
    torch.testing.assert_close(each[3] / each[7], blended[3].float() / blended[7].float())


@pytest.mark.parametrize("reader", [SimpleITKIO, SimpleITKIOWithReorient, NibabelIO, NibabelIOWithReorient])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)])
def test_what_any_reader_reads_is_written_over_the_image(tmp_path, reader, axes):
    file = write_oblique_phantom(tmp_path)
    image = nibabel.load(file)
    permuted = nibabel.Nifti1Image(
        np.asarray(image.dataobj).transpose(axes), image.affine[:, [*axes, 3]], dtype=np.float32
    )
    nibabel.save(permuted, file)
    volume, properties = reader().read_images([str(file)])
    nibabel.save(as_nifti(volume[0], properties, file), tmp_path / "map.nii.gz")
    written, original = nibabel.load(tmp_path / "map.nii.gz"), nibabel.load(file)
    assert np.array_equal(written.affine, original.affine)
    assert np.array_equal(written.get_fdata(), original.get_fdata())


def test_an_image_in_another_format_keeps_its_geometry(tmp_path):
    file = write_oblique_phantom(tmp_path)
    sitk.WriteImage(sitk.ReadImage(file), tmp_path / "case_0000.nrrd")
    volume, properties = SimpleITKIO().read_images([str(tmp_path / "case_0000.nrrd")])
    written, original = as_nifti(volume[0], properties, tmp_path / "case_0000.nrrd"), nibabel.load(file)
    np.testing.assert_allclose(written.affine, original.affine, atol=1e-4)
    assert np.array_equal(written.get_fdata(), original.get_fdata())


class TestSlice:
    # Numbers that tell voxels apart, along axes that run to the right, to the front and up.
    VOLUME = np.arange(6 * 8 * 10, dtype=np.float32).reshape(6, 8, 10)
    FOREGROUND = np.zeros_like(VOLUME)
    FOREGROUND[4, 1:7, 1:9] = FOREGROUND[1:5, 2:6, 3] = FOREGROUND[2:4, 5, 2:6] = 1

    def stored(self, volume: np.ndarray, axes: str, spacing: tuple[float, ...] = (1, 1, 1)) -> nibabel.Nifti1Image:
        """As if it had been acquired along the given axes, and obliquely."""
        affine = np.eye(4)
        affine[:3, :3] = Rotation.from_euler("xyz", (10, -15, 20), degrees=True).as_matrix() @ np.diag(spacing)
        image = nibabel.Nifti1Image(volume, affine)
        return image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(axes)))

    @pytest.mark.parametrize(
        "axes, place", [("RAS", "k = 3"), ("LPS", "k = 3"), ("LPI", "k = 6"), ("PSR", "j = 3"), ("IRA", "i = 6")]
    )
    def test_the_front_is_up_and_the_right_on_the_left_however_it_is_stored(self, axes, place):
        shown = Slice(self.stored(self.FOREGROUND, axes))
        assert np.array_equal(shown.of(self.stored(self.VOLUME, axes)), self.VOLUME[::-1, ::-1, 3].T)
        assert shown.name == f"axial slice, {place}"
        assert shown.spacing == pytest.approx((1, 1))

    @pytest.mark.parametrize("axes", ["RAS", "PSR"])
    def test_thick_slices_are_shown_as_they_were_acquired(self, axes):
        sagittal = Slice(self.stored(self.FOREGROUND, axes, (4, 0.7, 0.5)))
        assert np.array_equal(sagittal.of(self.stored(self.VOLUME, axes)), self.VOLUME[4, ::-1, ::-1].T)
        assert sagittal.name == f"sagittal slice, {'ijk'[axes.index('R')]} = 4"
        assert sagittal.spacing == pytest.approx((0.5, 0.7))
        coronal = Slice(self.stored(self.FOREGROUND, axes, (0.7, 4, 0.5)))
        assert np.array_equal(coronal.of(self.stored(self.VOLUME, axes)), self.VOLUME[::-1, 5, ::-1].T)

    def test_without_foreground_it_is_in_the_middle(self):
        shown = Slice(self.stored(np.zeros_like(self.VOLUME), "RAS"))
        assert shown.name == "axial slice, k = 4"

    @pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1)])
    def test_where_there_is_only_one_slice_it_is_shown(self, tmp_path, shape):
        nibabel.save(
            nibabel.Nifti1Image(self.VOLUME[:, :, 3].reshape(shape), np.diag([-2, -3, 1, 1])), tmp_path / "x.nii"
        )
        volume, properties = SimpleITKIO().read_images([str(tmp_path / "x.nii")])
        image = as_nifti(volume[0], properties, tmp_path / "x.nii")
        assert np.array_equal(Slice(image).of(image), self.VOLUME[:, :, 3].T)
        assert Slice(image).spacing == (3, 2)
        assert Slice(image).name == ""


def test_a_map_lies_over_a_picture_without_orientation_as_viewers_read_it(tmp_path):
    file = tmp_path / "case_0000.png"
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(file)
    volume, properties = NaturalImage2DIO().read_images([str(file)])
    image = as_nifti(volume[0], properties, file)
    nibabel.save(image, tmp_path / "map.nii.gz")
    assert np.array_equal(Slice(image).of(image), volume[0, 0])
    written, original = sitk.ReadImage(tmp_path / "map.nii.gz"), sitk.ReadImage(file)
    assert np.array_equal(sitk.GetArrayFromImage(written)[0], sitk.GetArrayFromImage(original))
    for pixel in ((0, 0), (3, 2)):
        place = written.TransformIndexToPhysicalPoint((*pixel, 0))
        assert place[:2] == pytest.approx(original.TransformIndexToPhysicalPoint(pixel))


def test_boundary_voxels_have_a_neighbour_of_another_label():
    labels = np.zeros((1, 5, 5), np.uint8)
    labels[0, 1:4, 1:4] = 2
    boundary = on_boundary(labels)
    assert boundary.sum() == 8 + 12
    assert not boundary[0, 2, 2] and not boundary[0, 0, 0]


def test_means_are_taken_by_label_and_place_inside_only():
    labels = np.zeros((1, 5, 5), np.uint8)
    labels[0, 1:4, 1:4] = 2
    inside = np.ones(labels.shape, bool)
    inside[:, 0] = False
    regions = Regions(labels, inside, {0: "background", 1: "head", 2: "tail"})
    assert regions.voxels == {
        "background": {"interior": 2, "boundary": 9},
        "tail": {"interior": 1, "boundary": 8},
    }
    weights = np.where(on_boundary(labels), 0.25, 1.0)
    weights[0, 2, 2] = 0.5
    weights[:, 0] = 100
    assert regions.means(weights) == {
        "background": {"interior": 1.0, "boundary": 0.25},
        "tail": {"interior": 0.5, "boundary": 0.25},
    }
    assert regions.foreground_mean(weights) == pytest.approx((0.5 + 8 * 0.25) / 9)


def test_without_foreground_it_has_no_mean():
    regions = Regions(np.zeros((1, 3, 3), np.uint8), np.ones((1, 3, 3), bool), {0: "background"})
    assert np.isnan(regions.foreground_mean(np.ones((1, 3, 3))))


class TestCases:
    def test_channels_of_a_case_belong_together(self, tmp_path):
        foreign = ("notes.txt", "b.nii.gz", "._b_0000.nii.gz", "b_000.nii.gz", "b_0000.nrrd")
        for name in ("b_0001.nii.gz", "b_0000.nii.gz", "a_1_0000.nii.gz", *foreign):
            (tmp_path / name).touch()
        cases = find_cases([tmp_path, tmp_path / "b_0001.nii.gz"], ".nii.gz")
        names = {case: [Path(file).name for file in files] for case, files in cases.items()}
        assert names == {"a_1": ["a_1_0000.nii.gz"], "b": ["b_0000.nii.gz", "b_0001.nii.gz"]}
        assert find_cases([tmp_path / "b_0000.nii.gz", tmp_path / "b_0001.nii.gz"], ".nii.gz")["b"] == cases["b"]

    @pytest.mark.parametrize(
        "there, missing", [("1", "case_0000.nii.gz"), ("03", "case_0001.nii.gz, case_0002.nii.gz")]
    )
    def test_a_gap_in_the_channels_is_named(self, tmp_path, there, missing):
        for channel in there:
            (tmp_path / f"case_000{channel}.nii.gz").touch()
        with pytest.raises(XAttnResError, match=f"case_000{there[-1]}.nii.gz comes without {missing}: add"):
            find_cases([tmp_path], ".nii.gz")

    def test_two_images_for_one_channel_are_an_error(self, tmp_path):
        files = [tmp_path / folder / "case_0000.nii.gz" for folder in "ab"]
        for file in files:
            file.parent.mkdir()
            file.touch()
        with pytest.raises(XAttnResError, match="are the same channel of case: leave one out"):
            find_cases([file.parent for file in files], ".nii.gz")

    @pytest.mark.parametrize(
        "name, complaint", [("case.nii.gz", "not named"), ("case_0000.png", "not named"), (None, "does not exist")]
    )
    def test_a_name_that_is_none_is_an_error(self, tmp_path, name, complaint):
        file = tmp_path / (name or "missing_0000.nii.gz")
        if name:
            file.touch()
        with pytest.raises(XAttnResError, match=complaint):
            find_cases([file], ".nii.gz")

    def test_an_empty_folder_is_an_error(self, tmp_path):
        with pytest.raises(XAttnResError, match="no image that ends in _0000"):
            find_cases([tmp_path], ".nii.gz")


@pytest.mark.parametrize("num_stages, shape, num_labels", [(8, (40, 50), 2), (3, (80, 20), 2), (3, (20, 90), 117)])
def test_no_texts_of_a_case_overlap(num_stages, shape, num_labels):
    sources = history_of(num_stages, 1).sources
    rng = np.random.default_rng(0)
    prediction = np.zeros(shape, np.uint8)
    prediction.flat[: num_labels + 1] = range(num_labels + 1)
    labels = {0: "background"} | {value: f"structure {value}" for value in range(1, num_labels + 1)}
    picture = CasePicture("hippocampus_020, axial slice, k = 17", rng.random(shape), prediction, (1.0, 1.2), labels)
    for target, names in sources.items():
        picture.maps[target] = {name: (rng.random(shape), 0.12) for name in names}
    with style.context("default"):
        figure = draw_case(picture)
        assert_no_texts_overlap(figure)
    assert any(CAVEAT in text.get_text() for text in figure.texts)


def test_a_picture_of_few_maps_is_wide_enough_for_its_texts():
    maps = {"D0": {name: (np.ones((9, 9)), 0.5) for name in ("block1", "block2")}}
    with style.context("default"):
        assert_no_texts_overlap(
            draw_case(CasePicture("a", np.ones((9, 9)), np.eye(9, dtype=int), (1, 1), {1: "b"}, maps))
        )


@pytest.mark.parametrize("zoom", [1, 4])
def test_the_outline_is_where_the_foreground_is(zoom):
    prediction = np.zeros((100 * zoom, 80 * zoom), int)
    prediction[20 * zoom : 60 * zoom, 30 * zoom : 70 * zoom] = 1
    maps = {"D0": {"E0": (np.ones(prediction.shape), 1.0)}}
    figure = draw_case(CasePicture("case", np.ones(prediction.shape), prediction, (1.0, 1.0), {1: "head"}, maps))
    (outline,) = [line for axis in figure.axes for line in axis.collections if isinstance(line, ContourSet)]
    corners = np.array([outline.get_paths()[0].vertices.min(axis=0), outline.get_paths()[0].vertices.max(axis=0)])
    np.testing.assert_allclose(corners, np.array([[30, 20], [70, 60]]) * zoom - 0.5, atol=zoom)
