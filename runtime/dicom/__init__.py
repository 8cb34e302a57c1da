"""DICOM in and out: pydicom reads headers and decides, dcm2niix converts pixels."""
