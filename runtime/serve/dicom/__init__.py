"""The server for DICOM: takes a study, and sends the map into it."""
