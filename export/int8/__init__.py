"""The flags of INT8 and its verification; how it is found is in calibration."""
