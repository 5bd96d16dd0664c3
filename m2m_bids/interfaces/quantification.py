"""Interfaces over `m2m_bids.quantification`: regions, corrections, tables, SUV and SUVR."""

import logging
from pathlib import Path

from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    SimpleInterface,
    TraitedSpec,
    isdefined,
    traits,
)

from m2m_bids.interfaces.registration import ResampleImage, _ResampleImageInputSpec

logger = logging.getLogger(__name__)

_NOT_THIS_PERSONS = (
    "only the linear alignment with the template is used, which leaves its tissues apart from "
    "this person's"
)


class _PlaceLabelsInputSpec(BaseInterfaceInputSpec):
    label_file = File(exists=True, mandatory=True, desc="labels in the world of the T1w")
    original_file = File(exists=True, desc="the T1w on the grid of the labels, to check them by")
    t1w_file = File(exists=True, mandatory=True, desc="T1w image")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on the grid of the T1w")
    m2m_xfms = traits.List(File(exists=True), desc="deformable transforms, empty if rejected")
    needs_m2m = traits.Bool(
        False, usedefault=True, desc="whether labels are of another head, and no use without"
    )


class _PlaceLabelsOutputSpec(TraitedSpec):
    out_file = File(desc="labels on the grid of the T1w, numbered as they were; none if unusable")
    reason = traits.Str(desc="why they cannot be used, or nothing")


class PlaceLabels(SimpleInterface):
    """Bring labels of a T1w to its grid, if they can be read and are of its brain."""

    input_spec = _PlaceLabelsInputSpec
    output_spec = _PlaceLabelsOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.preprocessing.freesurfer import check_labels
        from m2m_bids.spatial.images import ImageError, load_image, save_image
        from m2m_bids.spatial.labels import labels_on_t1w, load_labels

        inputs, self._results["reason"] = self.inputs, ""
        if inputs.needs_m2m and not (isdefined(inputs.m2m_xfms) and inputs.m2m_xfms):
            self._results["reason"] = _NOT_THIS_PERSONS
            return runtime
        file = inputs.label_file
        t1w, mask = (load_image(name) for name in (inputs.t1w_file, inputs.mask_file))
        try:
            if isdefined(inputs.original_file):
                t1w.set_filename(inputs.t1w_file)  # messages name it
                check_labels(file, inputs.original_file, t1w)
            labels = labels_on_t1w(load_labels(file), t1w, mask, file)
        except ImageError as error:
            logger.warning("nothing is measured by regions: %s", error)
            self._results["reason"] = str(error)
            return runtime
        self._results["out_file"] = str(save_image(labels, Path(runtime.cwd) / "labels.nii.gz"))
        return runtime


class _CorrectPartialVolumeInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="PET image on its native grid, 3-D or 4-D")
    label_file = File(exists=True, desc="labels on the grid of the T1w; none if unusable")
    labels_reason = traits.Str("", usedefault=True, desc="why there are no labels")
    inverse_xfm = File(exists=True, mandatory=True, desc="ITK transform: scan to T1w points")
    scheme = traits.Enum("freesurfer", "tissues", mandatory=True, desc="what the labels mean")
    method = traits.Enum("gtm", "rbv", mandatory=True, desc="correction")
    psf_fwhm_mm = traits.List(traits.Float, mandatory=True, desc="one width, or three")
    metadata = traits.Dict(mandatory=True, desc="BIDS fields of the scan")


class _CorrectPartialVolumeOutputSpec(TraitedSpec):
    tacs_file = File(desc="corrected mean of each region and frame (GTM), TSV")
    out_file = File(desc="corrected image on the native grid (RBV)")
    reason = traits.Str(desc="why the scan could not be corrected, or nothing")


class CorrectPartialVolume(SimpleInterface):
    """Correct a PET scan for partial volume effects, on its native grid, if its labels allow."""

    input_spec = _CorrectPartialVolumeInputSpec
    output_spec = _CorrectPartialVolumeOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.quantification.names import region_names
        from m2m_bids.quantification.statistics import frame_times
        from m2m_bids.quantification.tables import write_tacs
        from m2m_bids.spatial.images import ImageError, save_image

        inputs, folder = self.inputs, Path(runtime.cwd)
        self._results["reason"] = inputs.labels_reason
        if not isdefined(inputs.label_file):
            return runtime
        try:
            corrected = self._corrected()
        except ImageError as error:
            logger.warning("partial volume effects are not corrected: %s", error)
            self._results["reason"] = str(error)
            return runtime
        names = region_names(corrected.labels, inputs.scheme)
        times = frame_times(inputs.metadata, len(corrected.values))
        tacs = write_tacs(folder / "tacs.tsv", list(names.values()), corrected.values, times)
        self._results["tacs_file"] = str(tacs)
        if corrected.image is not None:
            out_file = save_image(corrected.image, folder / "corrected.nii.gz")
            self._results["out_file"] = str(out_file)
        return runtime

    def _corrected(self):
        """Carry the labels to the scan and correct it with them."""
        from m2m_bids.quantification.partial_volume import correct, region_fractions
        from m2m_bids.spatial.images import load_image
        from m2m_bids.spatial.itk import read_chain
        from m2m_bids.spatial.labels import load_labels

        inputs = self.inputs
        scan, labels = load_image(inputs.in_file), load_labels(inputs.label_file)
        widths = inputs.psf_fwhm_mm
        fwhm_mm = tuple(widths) if len(widths) > 1 else widths[0]
        regions = region_fractions(labels, scan, read_chain(inputs.inverse_xfm), fwhm_mm)
        return correct(scan, regions, fwhm_mm, voxelwise=inputs.method == "rbv")


class _ResampleCorrectedInputSpec(_ResampleImageInputSpec):
    in_file = File(exists=True, desc="corrected image on its native grid; none without labels")


class ResampleCorrected(ResampleImage):
    """Bring a corrected image through its transforms with one interpolation, if there is one."""

    input_spec = _ResampleCorrectedInputSpec

    def _run_interface(self, runtime):
        from m2m_bids.spatial.images import load_image
        from m2m_bids.spatial.itk import read_chain
        from m2m_bids.spatial.resampling import resample_frames

        if not isdefined(self.inputs.in_file):
            return runtime
        image = load_image(self.inputs.in_file)
        if image.ndim == 3:
            return super()._run_interface(runtime)
        chains = [read_chain(*self.inputs.xfm)] * image.shape[3]
        reference = load_image(self.inputs.reference_file)
        out_file = resample_frames(image, chains, reference, Path(runtime.cwd) / "frames.nii.gz")
        self._results["out_file"] = str(out_file)
        return runtime


class _QuantifyScanInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, desc="scan on the grid of the T1w, 3-D or 4-D; if none, nothing")
    native_file = File(exists=True, mandatory=True, desc="scan on its native grid")
    label_file = File(exists=True, desc="labels on the grid of the T1w; none if unusable")
    labels_reason = traits.Str(desc="why there are no labels")
    xfm = File(exists=True, mandatory=True, desc="ITK transform: T1w to scan points")
    suvr_mask_file = File(exists=True, desc="mask of the reference region, world of the T1w")
    scan = traits.Dict(
        mandatory=True, desc="fields of `m2m_bids.quantification.scan.Quantification`"
    )


class _QuantifyScanOutputSpec(TraitedSpec):
    files = traits.Dict(desc="files by key, as `bids.naming.quantification_outputs` has them")
    facts = traits.Dict(desc="what sidecars say, by key")


class QuantifyScan(SimpleInterface):
    """Measure a scan in regions, and make SUV, SUVR and smoothed images of it."""

    input_spec = _QuantifyScanInputSpec
    output_spec = _QuantifyScanOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.bids.naming import smoothed_desc
        from m2m_bids.bids.request import SMOOTHING
        from m2m_bids.quantification.scan import field_of_view, quantify, smoothed_copies
        from m2m_bids.quantification.tables import write_statistics, write_tacs
        from m2m_bids.spatial.images import load_image, save_image
        from m2m_bids.spatial.itk import read_chain
        from m2m_bids.spatial.labels import load_labels

        inputs, folder = self.inputs, Path(runtime.cwd)
        if not isdefined(inputs.in_file):
            return runtime
        scan, image = self._scan(), load_image(inputs.in_file)
        labels = load_labels(inputs.label_file) if isdefined(inputs.label_file) else None
        chain = read_chain(inputs.xfm)
        is_seen = field_of_view(load_image(inputs.native_file), chain, image)
        found = quantify(image, labels, is_seen, scan)
        files = {}
        if found.regional is not None:
            statistics = found.regional.statistics
            files["stat"] = write_statistics(folder / "stat.tsv", statistics)
            if scan.is_pet:
                names = [row.region for row in statistics]
                means = found.regional.frame_means
                files["tacs"] = write_tacs(folder / "tacs.tsv", names, means, found.times)
        facts = dict(found.facts)
        for desc, made in found.images.items():
            files[desc] = save_image(made, folder / f"{desc}.nii.gz")
        images = {"preproc": image, **found.images}
        for desc, width_mm, copy in smoothed_copies(images, scan.smooth_fwhm_mm, is_seen):
            key = smoothed_desc(desc, width_mm)
            files[key] = save_image(copy, folder / f"{key}.nii.gz")
            facts[key] = {**facts.get(desc, {}), SMOOTHING: width_mm}
            del copy  # before the next is made
        self._results["files"] = {key: str(file) for key, file in files.items()}
        self._results["facts"] = facts
        return runtime

    def _scan(self):
        """Gather what is known of the scan; a mask that cannot be used gives the reason."""
        from m2m_bids.quantification.scan import Quantification
        from m2m_bids.spatial.images import ImageError
        from m2m_bids.spatial.labels import load_labels

        inputs, known = self.inputs, {}
        if isdefined(inputs.labels_reason):
            known["labels_reason"] = inputs.labels_reason
        if isdefined(inputs.suvr_mask_file):
            try:
                known["suvr_mask"] = load_labels(inputs.suvr_mask_file)
            except ImageError as error:
                known["suvr_reason"] = str(error)
        return Quantification(**{**inputs.scan, **known})
