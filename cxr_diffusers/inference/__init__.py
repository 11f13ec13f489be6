"""A trained pipeline at work: detection over files, export, trajectories, DICOM output, reference scores."""
