"""Write a 3MF file: the mesh format of slicers that knows its unit, millimetres here.

It is a zip with one XML file and two that say where it is (3MF Core Specification 1.3). The standard library is enough
for it: trimesh would need lxml, and would write other bytes each time.
"""

import zipfile
from io import BytesIO

import numpy as np

LINES = 1 << 14  # elements formatted at once
DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can have: the same mesh makes the same bytes
CORE = "http://schemas.microsoft.com/3dmanufacturing/core/2015/02"
HEADER = '<?xml version="1.0" encoding="UTF-8"?>\n'
TYPES = f"""{HEADER}<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">
<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>
<Default Extension="model" ContentType="application/vnd.ms-package.3dmanufacturing-3dmodel+xml"/>
</Types>
"""
RELATIONS = f"""{HEADER}<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">
<Relationship Target="/3D/3dmodel.model" Id="rel0" Type="http://schemas.microsoft.com/3dmanufacturing/2013/01/3dmodel"/>
</Relationships>
"""
BEGIN = f"""{HEADER}<model unit="millimeter" xml:lang="en-US" xmlns="{CORE}">
<resources><object id="1" type="model"><mesh><vertices>
"""
BETWEEN = "</vertices><triangles>\n"
END = '</triangles></mesh></object></resources>\n<build><item objectid="1"/></build>\n</model>\n'


def three_mf_bytes(vertices: np.ndarray, faces: np.ndarray) -> bytes:
    """Return the content of a 3MF file of vertices (V, 3) in millimetres and faces (F, 3)."""
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (("[Content_Types].xml", TYPES), ("_rels/.rels", RELATIONS)):
            archive.writestr(_entry(name), content)
        with archive.open(_entry("3D/3dmodel.model"), "w") as model:
            model.write(BEGIN.encode())
            _write_rows(model, '<vertex x="%.8g" y="%.8g" z="%.8g"/>\n', vertices)
            model.write(BETWEEN.encode())
            _write_rows(model, '<triangle v1="%d" v2="%d" v3="%d"/>\n', faces)
            model.write(END.encode())
    return packed.getvalue()


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, DATE)
    entry.compress_type = zipfile.ZIP_DEFLATED
    return entry


def _write_rows(file, line: str, rows: np.ndarray) -> None:
    for start in range(0, len(rows), LINES):
        piece = rows[start : start + LINES]
        file.write((line * len(piece) % tuple(piece.ravel().tolist())).encode())
