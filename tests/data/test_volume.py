import gzip
import os
import resource
import struct
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from medssl.core.errors import DataError, DiskError
from medssl.data.volume import affines_agree, read_header, read_label, read_volume, spacing_of, write_nifti

SHAPE = (6, 7, 5)


def voxels(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(np.int16)


def oblique(spacing=(1.3, 0.9, 5.0), angle=0.2):
    c, s = np.cos(angle), np.sin(angle)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) * spacing
    affine[:3, 3] = (-80.5, 12.25, 30.0)
    return affine


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(voxels(), oblique()), path)
    return path


def edited_header(path, **fields):
    """The bytes of ``path`` with fields of its NIfTI-1 header replaced, without nibabel's corrections."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    raw[:348] = header.structarr.tobytes()
    return bytes(raw)


def as_gz(path, raw):
    path.write_bytes(gzip.compress(raw))
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
def test_every_format_gives_the_same_voxels_and_affine(tmp_path, suffix):
    path = tmp_path / f"image{suffix}"
    if suffix in (".mha", ".nrrd"):
        nib.save(nib.Nifti1Image(voxels(), oblique()), tmp_path / "source.nii")
        sitk.WriteImage(sitk.ReadImage(str(tmp_path / "source.nii")), str(path))
    else:
        nib.save(nib.Nifti1Image(voxels(), oblique()), path)
    volume = read_volume(path)
    header = read_header(path)
    assert volume.data.dtype == np.float32
    assert volume.data.flags.c_contiguous
    np.testing.assert_array_equal(volume.data[0], voxels())
    np.testing.assert_allclose(volume.affine, oblique(), atol=1e-4)
    np.testing.assert_array_equal(header.affine, volume.affine)
    assert header.shape == SHAPE
    assert header.spacing == pytest.approx((1.3, 0.9, 5.0), abs=1e-5)


@pytest.mark.parametrize("shape", [SHAPE, (1, *SHAPE), (1, 1, *SHAPE)])
def test_npy_is_read_without_geometry_and_says_so(tmp_path, shape):
    array = voxels().astype(np.float32)
    np.save(tmp_path / "a.npy", array.reshape(shape))
    volume = read_volume(tmp_path / "a.npy")
    np.testing.assert_array_equal(volume.data[0], array)
    np.testing.assert_array_equal(volume.affine, np.eye(4))
    assert "no geometry" in read_header(tmp_path / "a.npy").warnings[0]


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
def test_byte_order_and_nifti_version_do_not_matter(tmp_path, big_endian, image_class):
    header = image_class.header_class(endianness=">" if big_endian else "<")
    header.set_data_dtype(np.dtype(np.int16).newbyteorder(">" if big_endian else "<"))
    nib.save(image_class(voxels(), oblique(), header), tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(volume.data[0], voxels())
    np.testing.assert_allclose(volume.affine, oblique(), atol=1e-5)


def test_scaling_in_the_header_is_applied_as_nibabel_does(tmp_path):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_slope_inter(0.5, -3)
    values = voxels() * 0.5 - 3
    nib.save(nib.Nifti1Image(values, np.eye(4), header), tmp_path / "a.nii.gz")
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii.gz").data[0], values, atol=0.01)
    np.testing.assert_allclose(
        read_volume(tmp_path / "a.nii.gz").data[0], nib.load(tmp_path / "a.nii.gz").get_fdata(), atol=1e-4
    )


def test_every_flipped_bit_of_a_gzip_file_is_noticed(file):
    good = bytearray(file.read_bytes())
    original = read_volume(file)
    unnoticed = []
    rng = np.random.default_rng(0)
    for bit in rng.choice(len(good) * 8, size=200, replace=False):
        broken = bytearray(good)
        broken[bit // 8] ^= 1 << (bit % 8)
        file.write_bytes(broken)
        try:
            volume = read_volume(file)
        except DataError:
            continue
        if not (np.array_equal(volume.data, original.data) and np.array_equal(volume.affine, original.affine)):
            unnoticed.append(int(bit))
        assert bit < 300 * 8  # only the name, time stamp and flags of the gzip header carry no voxels
    assert unnoticed == []


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999])
def test_a_truncated_file_is_refused(tmp_path, suffix, share):
    path = tmp_path / f"a{suffix}"
    nib.save(nib.Nifti1Image(voxels(shape=(20, 20, 10)), np.eye(4)), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=r"a\.nii"):
        read_volume(path)


def test_garbage_after_the_gzip_stream_is_refused_but_zero_padding_and_members_are_not(file):
    content = file.read_bytes()
    file.write_bytes(content + b"garbage")
    with pytest.raises(DataError, match="after the end"):
        read_volume(file)
    file.write_bytes(content + bytes(512))
    np.testing.assert_array_equal(read_volume(file).data[0], voxels())
    raw = gzip.decompress(content)
    file.write_bytes(gzip.compress(raw[:500]) + gzip.compress(raw[500:]))
    np.testing.assert_array_equal(read_volume(file).data[0], voxels())


def test_a_file_longer_than_its_header_declares_is_refused(file):
    as_gz(file, gzip.decompress(file.read_bytes()) + bytes(10_000))
    with pytest.raises(DataError, match="more than its header declares"):
        read_volume(file)


@pytest.mark.parametrize("declared", ["declared", "hidden"])
def test_a_decompression_bomb_is_refused_in_little_memory(tmp_path, file, declared):
    shape = (1024, 1024, 1024) if declared == "declared" else SHAPE
    raw = edited_header(file, dim=[3, *shape, 1, 1, 1, 1], datatype=2, bitpix=8)
    bomb = tmp_path / "bomb.nii.gz"
    with gzip.open(bomb, "wb", compresslevel=1) as out:
        out.write(raw[:352])
        for _ in range(200):
            out.write(bytes(2**20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="too large|more than its header"):
        read_volume(bomb)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 64e6


def test_dimensions_that_overflow_are_refused(file, tmp_path):
    path = as_gz(tmp_path / "a.nii.gz", edited_header(file, dim=[4, 32767, 32767, 32767, 32767, 1, 1, 1]))
    with pytest.raises(DataError, match="too large"):
        read_volume(path, frame=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pixdim": [1, 0, 1, 1, 1, 1, 1, 1]}, "voxel size"),
        ({"pixdim": [1, 1, np.nan, 1, 1, 1, 1, 1]}, "voxel size"),
        ({"pixdim": [1, 1, 1, -2, 1, 1, 1, 1]}, "voxel size"),
        ({"dim": [3, 6, -7, 5, 1, 1, 1, 1]}, "dimensions"),
        ({"dim": [3, 6, 0, 5, 1, 1, 1, 1]}, "dimensions"),
        ({"dim": [9, 6, 7, 5, 1, 1, 1, 1]}, "dimensions"),
        ({"dim": [2, 6, 35, 1, 1, 1, 1, 1]}, "not a volume"),
        ({"dim": [5, 6, 7, 1, 1, 5, 1, 1]}, "not a volume"),
        ({"dim": [3, 6, 7, 50, 1, 1, 1, 1]}, "truncated"),
        ({"datatype": 32, "bitpix": 64}, "plain numbers"),
        ({"datatype": 128, "bitpix": 24}, "plain numbers"),
        ({"datatype": 9999}, "voxel type"),
        ({"magic": b"ni1"}, "single-file"),
        ({"magic": b"abc"}, "single-file"),
        ({"vox_offset": 5e8}, "truncated"),
        ({"vox_offset": np.nan}, "start of the voxels"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "geometry"),
        ({"srow_x": [1, 0, 0, 0], "srow_y": [0, 1, 1, 0], "srow_z": [0] * 4, "pixdim": [1] * 8}, "not a grid"),
    ],
)
def test_an_impossible_header_is_refused_with_its_reason(tmp_path, file, fields, message):
    path = as_gz(tmp_path / "bad.nii.gz", edited_header(file, **fields))
    with pytest.raises(DataError, match=message) as caught:
        read_volume(path, frame=None)
    assert "bad.nii.gz" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>Not found</html>", "not gzip"),
        (gzip.compress(b"<html>" * 100, mtime=0), "not a NIfTI"),
        (gzip.compress(struct.pack("<i", 348) + bytes(10), mtime=0), "ends inside its header"),
    ],
)
def test_other_content_under_this_name_is_refused(tmp_path, content, message):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(content)
    for read in (read_volume, read_header):
        with pytest.raises(DataError, match=message):
            read(path)


@pytest.mark.parametrize("name", ["fifo.nii.gz", "folder.nii.gz", "missing.nii.gz", "a.hdr", "a.dcm", "link.nii.gz"])
def test_what_is_not_a_readable_file_is_refused_before_it_is_opened(tmp_path, name):
    os.mkfifo(tmp_path / "fifo.nii.gz")
    (tmp_path / "folder.nii.gz").mkdir()
    (tmp_path / "a.hdr").write_bytes(b"x")
    (tmp_path / "link.nii.gz").symlink_to("/dev/zero")
    for read in (read_volume, read_header, read_label):
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            read(tmp_path / name)


def test_nothing_is_unpickled_from_npy(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="npy"):
        read_volume(tmp_path / "a.npy")


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damage_of_compressed_mha_and_nrrd_never_changes_voxels(tmp_path, suffix, damage):
    path = tmp_path / f"a{suffix}"
    values = np.random.default_rng(0).integers(0, 100, (20, 20, 10)).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(values), str(path), True)
    good = path.read_bytes()
    rng, refused = np.random.default_rng(1), 0
    for _ in range(20):
        broken = bytearray(good)
        if damage == "flip":
            broken[rng.integers(len(good) - 2000, len(good))] ^= 1 << int(rng.integers(8))
        else:
            broken = broken[: rng.integers(len(good) - 2000, len(good) - 1)]
        path.write_bytes(broken)
        try:
            data = read_volume(path).data
        except DataError:
            refused += 1
        else:
            np.testing.assert_array_equal(data[0], values.T)
    assert refused >= 18


@pytest.mark.parametrize("name", ["a.nii", "b.nii", "c.npy", "d.mha", "e.nrrd"])
def test_any_bytes_in_a_header_give_a_volume_or_a_data_error(tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".nii":
        image_class = nib.Nifti1Image if name == "a.nii" else nib.Nifti2Image
        nib.save(image_class(voxels(), oblique()), path)
    elif path.suffix == ".npy":
        np.save(path, voxels())
    else:
        sitk.WriteImage(sitk.GetImageFromArray(voxels()), str(path), True)
    good, rng = path.read_bytes(), np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(80):
        broken = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            broken[rng.integers(0, min(len(good), 352))] = rng.integers(0, 256)
        path.write_bytes(broken)
        for read in (read_header, read_volume, read_label):
            try:
                read(path)
                outcomes["read"] += 1
            except DataError:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 0


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_headers_that_point_at_other_files_are_refused(tmp_path, suffix):
    text = {
        ".mha": "NDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = /etc/passwd\n",
        ".nrrd": "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 2 2\nencoding: raw\ndata file: /etc/passwd\n\n",
    }[suffix]
    (tmp_path / f"a{suffix}").write_text(text)
    with pytest.raises(DataError, match="not inside this file"):
        read_volume(tmp_path / f"a{suffix}")


def test_frames_are_chosen_and_a_missing_choice_names_their_number(tmp_path):
    frames = voxels(shape=(*SHAPE, 4))
    nib.save(nib.Nifti1Image(frames, oblique()), tmp_path / "a.nii.gz")
    with pytest.raises(DataError, match="4 frames"):
        read_volume(tmp_path / "a.nii.gz")
    with pytest.raises(DataError, match="no frame 4"):
        read_volume(tmp_path / "a.nii.gz", frame=4)
    volume = read_volume(tmp_path / "a.nii.gz", frame=2)
    np.testing.assert_array_equal(volume.data[0], frames[..., 2])
    np.testing.assert_allclose(volume.affine, oblique(), atol=1e-5)
    header = read_header(tmp_path / "a.nii.gz")
    assert (header.shape, header.n_frames) == ((*SHAPE, 4), 4)


@pytest.mark.parametrize("n_frames", [1, 3])
@pytest.mark.parametrize("wrong", ["sform", "qform"])
def test_acdc_like_conflict_of_sform_and_qform_gives_the_true_spacing(tmp_path, n_frames, wrong):
    spacing = (1.316, 1.316, 10.0)
    shape = SHAPE if n_frames == 1 else (*SHAPE, n_frames)
    image = nib.Nifti1Image(np.ones(shape, np.int16), None)
    image.header.set_zooms((*spacing, 1.0)[: len(shape)])
    true, unit = np.diag([*spacing, 1.0]), np.eye(4)
    image.set_sform(unit if wrong == "sform" else true, code=1)
    # set_qform would rewrite the voxel size: the two codes alone describe the conflict.
    image.header["qform_code"] = 0 if wrong == "sform" else 1
    image.header["pixdim"][1:4] = spacing
    if wrong == "qform":
        image.header["quatern_b"] = 1.0
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(image.to_bytes()))
    header = read_header(tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz", frame=None if n_frames == 1 else 0)
    assert header.spacing == pytest.approx(spacing, rel=1e-5)
    assert spacing_of(volume.affine) == pytest.approx(spacing, rel=1e-5)
    if wrong == "sform":
        assert "contradicts itself" in header.warnings[0]
        assert volume.warnings == tuple(header.warnings)


def test_channels_must_share_a_grid_and_the_error_names_both_files(tmp_path):
    nib.save(nib.Nifti1Image(voxels(0), oblique()), tmp_path / "t1.nii.gz")
    nib.save(nib.Nifti1Image(voxels(1), oblique()), tmp_path / "t2.nii.gz")
    moved = oblique()
    moved[0, 3] += 0.1
    nib.save(nib.Nifti1Image(voxels(2), moved), tmp_path / "moved.nii.gz")
    nib.save(nib.Nifti1Image(voxels(2, (6, 7, 6)), oblique()), tmp_path / "other.nii.gz")
    both = read_volume([tmp_path / "t1.nii.gz", tmp_path / "t2.nii.gz"])
    np.testing.assert_array_equal(both.data, [voxels(0), voxels(1)])
    for name, found in (("moved", "affines"), ("other", r"\(6, 7, 6\)")):
        with pytest.raises(DataError, match=found) as caught:
            read_volume([tmp_path / "t1.nii.gz", tmp_path / f"{name}.nii.gz"])
        assert "t1.nii.gz" in str(caught.value)
        assert f"{name}.nii.gz" in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_not_finite_are_counted_and_refused(tmp_path, value):
    array = voxels().astype(np.float32)
    array[1, 2, :3] = value
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(DataError, match="3 of 210 voxels"):
        read_volume(tmp_path / "a.nii.gz")


def test_label_maps_are_rounded_within_the_tolerance_and_refused_beyond(tmp_path):
    label = np.random.default_rng(0).integers(0, 4, SHAPE)
    for name, array in (("int", label.astype(np.uint8)), ("near", label + 0.0005), ("off", label * 0.9999 + 0.002)):
        nib.save(nib.Nifti1Image(array, oblique()), tmp_path / f"{name}.nii.gz")
    for name in ("int", "near"):
        read, affine = read_label(tmp_path / f"{name}.nii.gz")
        assert read.dtype == np.int16
        np.testing.assert_array_equal(read, label)
        np.testing.assert_allclose(affine, oblique(), atol=1e-5)
    with pytest.raises(DataError, match="not whole numbers"):
        read_label(tmp_path / "off.nii.gz")


@pytest.mark.parametrize("value", [-1.0, 40_000.0, np.nan])
def test_impossible_label_values_are_refused(tmp_path, value):
    label = np.zeros(SHAPE, np.float32)
    label[0, 0, 0] = value
    nib.save(nib.Nifti1Image(label, np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(DataError, match="label"):
        read_label(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("shift", [0.1, 1.0, 50.0])
def test_affines_agree_sees_shifts_and_flips_but_not_float32_rounding(shift):
    affine, shape = oblique(), (256, 256, 40)
    assert affines_agree(affine, affine.astype(np.float32), shape)
    moved = affine.copy()
    moved[1, 3] += shift
    assert not affines_agree(affine, moved, shape)
    assert not affines_agree(affine, affine @ np.diag([-1.0, 1, 1, 1]), shape)
    assert not affines_agree(affine, affine[:, [1, 0, 2, 3]], shape)


def test_written_files_come_back_exactly_in_all_48_orientations(tmp_path):
    label = np.random.default_rng(0).integers(0, 4, SHAPE)
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        affine = np.eye(4)
        affine[:3, :3] = (oblique()[:3, :3] * signs)[:, list(order)]
        affine[:3, 3] = (10, -20, 30)
        path = write_nifti(tmp_path / "a.nii.gz", label, affine, dtype=np.uint8)
        read, back = read_label(path)
        np.testing.assert_array_equal(read, label)
        np.testing.assert_allclose(back, affine, atol=1e-5)
        assert read_header(path).warnings == []


def test_writing_is_deterministic_and_keeps_the_old_file_when_the_disk_is_full(tmp_path):
    path = write_nifti(tmp_path / "a.nii", voxels(), oblique(), dtype=np.int16)
    before = path.read_bytes()
    assert write_nifti(tmp_path / "b.nii", voxels(), oblique(), dtype=np.int16).read_bytes() == before
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DiskError, match="no space"):
            write_nifti(path, voxels(shape=(30, 30, 30)), oblique(), dtype=np.int16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii", "b.nii"]


@pytest.mark.real_data
def test_real_files_are_read_as_nibabel_reads_them(real_data):
    for name in ("brain-t1-age/images/patient01_study1_T1W", "hippocampus/images/hippocampus_003"):
        path = real_data / f"{name}.nii.gz"
        volume, reference = read_volume(path), nib.load(path)
        np.testing.assert_allclose(volume.data[0], reference.get_fdata(dtype=np.float32), rtol=1e-6)
        np.testing.assert_allclose(volume.affine, reference.affine, atol=1e-6)
        assert read_header(path).warnings == []
    assert spacing_of(
        read_header(real_data / "brain-t1-age/images/patient01_study1_T1W.nii.gz").affine
    ) == pytest.approx((0.71875, 0.71875, 3.0), abs=1e-4)
