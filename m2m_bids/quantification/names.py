"""Names of the regions of label images."""

from collections.abc import Iterable
from typing import Literal

Scheme = Literal["freesurfer", "tissues"]

TISSUES = {1: "GM", 2: "WM", 3: "CSF"}
"""Tissues as BIDS numbers and names them."""

_PAIRED = {
    2: "Cerebral-White-Matter",
    3: "Cerebral-Cortex",
    4: "Lateral-Ventricle",
    5: "Inf-Lat-Vent",
    7: "Cerebellum-White-Matter",
    8: "Cerebellum-Cortex",
    10: "Thalamus",
    11: "Caudate",
    12: "Putamen",
    13: "Pallidum",
    17: "Hippocampus",
    18: "Amygdala",
    26: "Accumbens-area",
    28: "VentralDC",
    30: "vessel",
    31: "choroid-plexus",
}
# The numbers of the right side have no constant distance from those of the left.
_RIGHT = (41, 42, 43, 44, 46, 47, 49, 50, 51, 52, 53, 54, 58, 60, 62, 63)
_UNPAIRED = {
    14: "3rd-Ventricle",
    15: "4th-Ventricle",
    16: "Brain-Stem",
    24: "CSF",
    72: "5th-Ventricle",
    77: "WM-hypointensities",
    80: "non-WM-hypointensities",
    85: "Optic-Chiasm",
    173: "Midbrain",
    174: "Pons",
    175: "Medulla",
    178: "SCP",
    251: "CC_Posterior",
    252: "CC_Mid_Posterior",
    253: "CC_Central",
    254: "CC_Mid_Anterior",
    255: "CC_Anterior",
    5001: "Left-UnsegmentedWhiteMatter",
    5002: "Right-UnsegmentedWhiteMatter",
}
# Desikan-Killiany, in the order of its numbers, from 0.
_CORTEX = """
unknown bankssts caudalanteriorcingulate caudalmiddlefrontal corpuscallosum cuneus entorhinal
fusiform inferiorparietal inferiortemporal isthmuscingulate lateraloccipital lateralorbitofrontal
lingual medialorbitofrontal middletemporal parahippocampal paracentral parsopercularis
parsorbitalis parstriangularis pericalcarine postcentral posteriorcingulate precentral precuneus
rostralanteriorcingulate rostralmiddlefrontal superiorfrontal superiorparietal superiortemporal
supramarginal frontalpole temporalpole transversetemporal insula
""".split()  # noqa: SIM905 - one a line would be a page


def region_names(numbers: Iterable[int], scheme: Scheme) -> dict[int, str]:
    """
    Name the regions of a label image.

    Parameters
    ----------
    numbers : iterable of int
        Labels; 0, the background, is left out.
    scheme : {"freesurfer", "tissues"}
        What they mean: FreeSurfer's aseg, aparc+aseg or wmparc, or tissues as BIDS numbers them.

    Returns
    -------
    dict of int to str
        Names as in FreeSurfer's table, each once; ``label-N`` for numbers that have none here.

    Examples
    --------
    >>> region_names([0, 8, 47, 1035, 4002, 12110], "freesurfer")
    {8: 'Left-Cerebellum-Cortex', 47: 'Right-Cerebellum-Cortex', 1035: 'ctx-lh-insula',
     4002: 'wm-rh-caudalanteriorcingulate', 12110: 'label-12110'}
    >>> region_names([1, 2, 3], "tissues")
    {1: 'GM', 2: 'WM', 3: 'CSF'}
    """
    known = TISSUES if scheme == "tissues" else _FREESURFER
    return {int(n): known.get(int(n), f"label-{int(n)}") for n in numbers if n != 0}


def _freesurfer_names() -> dict[int, str]:
    names = dict(_UNPAIRED)
    for (left, name), right in zip(_PAIRED.items(), _RIGHT, strict=True):
        names[left], names[right] = f"Left-{name}", f"Right-{name}"
    for first, start in ((1000, "ctx-lh"), (2000, "ctx-rh"), (3000, "wm-lh"), (4000, "wm-rh")):
        names.update({first + number: f"{start}-{name}" for number, name in enumerate(_CORTEX)})
    return names


_FREESURFER = _freesurfer_names()
