"""An enhanced MR object of classic images: what its frames have in common, and what each has."""

import copy

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedMRImageStorage, generate_uid

COMPONENTS = {"phase": "PHASE", "magnitude": "MAGNITUDE", "real": "REAL", "imaginary": "IMAGINARY"}
KEPT = (  # of the classic header; the rest goes into functional groups
    "SpecificCharacterSet", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID",
    "StudyDate", "StudyTime", "SeriesDate", "SeriesTime",
    "ContentDate", "ContentTime", "AccessionNumber", "StudyID",
    "Modality", "StudyDescription", "SeriesDescription", "ReferringPhysicianName",
    "Manufacturer", "ManufacturerModelName", "InstitutionName", "StationName",
    "DeviceSerialNumber", "SoftwareVersions", "PatientName", "PatientID",
    "PatientBirthDate", "PatientSex", "PatientAge", "PatientWeight",
    "PatientPosition", "PositionReferenceIndicator", "ProtocolName", "SeriesNumber",
    "AcquisitionNumber", "Rows", "Columns", "SamplesPerPixel",
    "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation",
)  # fmt: skip


def enhanced_of(images):
    """Return an enhanced MR object whose frames are classic images, in the order given."""
    first = images[0]
    made = Dataset()
    made.SOPClassUID = EnhancedMRImageStorage
    made.SOPInstanceUID = generate_uid(entropy_srcs=[first.SeriesInstanceUID, "enhanced"])
    for name in KEPT:
        made.add(copy.deepcopy(first[name]))
    for element in first.group_dataset(0x0029):
        made.add(copy.deepcopy(element))
    made.InstanceNumber = 1
    made.NumberOfFrames = len(images)
    made.add_new("PixelData", "OW", b"".join(image.PixelData for image in images))
    _acquisition(made, first, {image.role for image in images})
    times = sorted({float(image.EchoTime) for image in images})
    places = sorted({image.slice for image in images})
    made.PerFrameFunctionalGroupsSequence = Sequence(
        _own(image, times, places, number) for number, image in enumerate(images, 1)
    )
    _dimensions(made)
    return made


def _item(**elements):
    item = Dataset()
    for name, value in elements.items():
        setattr(item, name, value)
    return item


def _one(**elements):
    return Sequence([_item(**elements)])


def _acquisition(made, first, roles):
    """Say what is true of all frames."""
    made.ImageType = ["ORIGINAL", "PRIMARY", "T2_STAR", "MIXED" if len(roles) > 1 else "NONE"]
    made.VolumetricProperties, made.VolumeBasedCalculationTechnique = "VOLUME", "NONE"
    made.PixelPresentation, made.LossyImageCompression = "MONOCHROME", "00"
    made.ComplexImageComponent = "MIXED" if len(roles) > 1 else COMPONENTS[min(roles)]
    made.AcquisitionContrast, made.ContentQualification = "T2_STAR", "PRODUCT"
    made.BurnedInAnnotation, made.PresentationLUTShape = "NO", "IDENTITY"
    made.AcquisitionDateTime = first.AcquisitionDate + first.AcquisitionTime
    made.AcquisitionDuration = 300.0
    made.MagneticFieldStrength, made.ResonantNucleus = float(first.MagneticFieldStrength), "1H"
    made.KSpaceFiltering, made.ApplicableSafetyStandardAgency = "NONE", "IEC"
    made.PulseSequenceName, made.MRAcquisitionType = "gre", "3D"
    made.EchoPulseSequence = "GRADIENT"
    made.MultiPlanarExcitation, made.SteadyStatePulseSequence = "NO", "NONE"
    made.PhaseContrast, made.TimeOfFlightContrast = "NO", "NO"
    made.EchoPlanarPulseSequence = "NO"
    made.AcquisitionContextSequence = Sequence()
    made.SaturationRecovery, made.SpectrallySelectedSuppression = "NO", "NONE"
    made.OversamplingPhase, made.GeometryOfKSpaceTraversal = "NONE", "RECTILINEAR"
    made.SegmentedKSpaceTraversal, made.CoverageOfKSpace = "SINGLE", "FULL"
    made.RectilinearPhaseEncodeReordering, made.NumberOfKSpaceTrajectories = "LINEAR", 1
    size = _item(PixelSpacing=first.PixelSpacing, SliceThickness=first.SliceThickness)
    size.SpacingBetweenSlices = first.SpacingBetweenSlices
    shared = Dataset()
    shared.PixelMeasuresSequence = Sequence([size])
    shared.PlaneOrientationSequence = _one(ImageOrientationPatient=first.ImageOrientationPatient)
    region = _item(
        CodeValue="12738006", CodingSchemeDesignator="SCT", CodeMeaning="Brain structure"
    )
    shared.FrameAnatomySequence = _one(AnatomicRegionSequence=[region], FrameLaterality="U")
    shared.MRTimingAndRelatedParametersSequence = _one(
        RepetitionTime=first.RepetitionTime,
        FlipAngle=first.FlipAngle,
        EchoTrainLength=3,
        RFEchoTrainLength=0,
        GradientEchoTrainLength=3,
        SpecificAbsorptionRateSequence=_one(
            SpecificAbsorptionRateDefinition="IEC_HEAD", SpecificAbsorptionRateValue=0.02
        ),
        OperatingModeSequence=_one(OperatingModeType="STATIC FIELD", OperatingMode="IEC_NORMAL"),
    )
    shared.MRFOVGeometrySequence = _one(
        InPlanePhaseEncodingDirection="ROW",
        MRAcquisitionFrequencyEncodingSteps=56,
        MRAcquisitionPhaseEncodingStepsInPlane=48,
        MRAcquisitionPhaseEncodingStepsOutOfPlane=24,
        PercentSampling=100.0,
        PercentPhaseFieldOfView=100.0,
    )
    shared.MRModifierSequence = _one(
        InversionRecovery="NO",
        FlowCompensation="NONE",
        Spoiling="RF",
        T2Preparation="NO",
        SpectrallySelectedExcitation="NONE",
        SpatialPresaturation="NONE",
        PartialFourier="NO",
        ParallelAcquisition="NO",
    )
    shared.MRImagingModifierSequence = _one(
        MagnetizationTransfer="NONE",
        BloodSignalNulling="NO",
        Tagging="NONE",
        TransmitterFrequency=float(first.ImagingFrequency),
        PixelBandwidth=first.PixelBandwidth,
    )
    shared.MRAveragesSequence = _one(NumberOfAverages="1")
    shared.MRReceiveCoilSequence = _one(
        ReceiveCoilName="HeadNeck_64",
        ReceiveCoilManufacturerName="",
        ReceiveCoilType="MULTICOIL",
        QuadratureReceiveCoil="NO",
        MultiCoilDefinitionSequence=_one(MultiCoilElementName="H1", MultiCoilElementUsed="YES"),
    )
    shared.MRTransmitCoilSequence = _one(
        TransmitCoilName="Body", TransmitCoilManufacturerName="", TransmitCoilType="BODY"
    )
    localizer = _item(
        ReferencedSOPClassUID=EnhancedMRImageStorage,
        ReferencedSOPInstanceUID=generate_uid(entropy_srcs=[first.StudyInstanceUID, "localizer"]),
        ReferencedFrameNumber=1,
    )
    localizer.PurposeOfReferenceCodeSequence = _one(
        CodeValue="121311", CodingSchemeDesignator="DCM", CodeMeaning="Localizer"
    )
    shared.ReferencedImageSequence = Sequence([localizer])
    made.SharedFunctionalGroupsSequence = Sequence([shared])


def _own(image, times, places, number):
    """Return what is true of one frame."""
    own = Dataset()
    own.FrameContentSequence = _one(
        FrameAcquisitionDateTime=image.AcquisitionDate + image.AcquisitionTime,
        FrameReferenceDateTime=image.AcquisitionDate + image.AcquisitionTime,
        FrameAcquisitionDuration=300.0,
        FrameAcquisitionNumber=1,
        StackID="1",
        InStackPositionNumber=places.index(image.slice) + 1,
        DimensionIndexValues=[
            1,
            places.index(image.slice) + 1,
            times.index(float(image.EchoTime)) + 1,
            [*COMPONENTS].index(image.role) + 1,
        ],
    )
    component = COMPONENTS[image.role]
    own.MRImageFrameTypeSequence = _one(
        FrameType=["ORIGINAL", "PRIMARY", "T2_STAR", "NONE"],
        PixelPresentation="MONOCHROME",
        VolumetricProperties="VOLUME",
        VolumeBasedCalculationTechnique="NONE",
        ComplexImageComponent=component,
        AcquisitionContrast="T2_STAR",
    )
    own.PlanePositionSequence = _one(ImagePositionPatient=image.ImagePositionPatient)
    own.MREchoSequence = _one(EffectiveEchoTime=float(image.EchoTime))
    own.PixelValueTransformationSequence = _one(
        RescaleSlope=image.get("RescaleSlope", "1"),
        RescaleIntercept=image.get("RescaleIntercept", "0"),
        RescaleType=image.get("RescaleType", "US"),
    )
    other = _item(EchoTime="99", ImagePositionPatient=[0, 0, number], PatientID="other")
    block = own.private_block(0x2005, "Philips MR Imaging DD 005", create=True)
    block.add_new(0x0F, "SQ", [other])  # in which Philips has a whole other header
    own.FrameVOILUTSequence = _one(WindowCenter=image.WindowCenter, WindowWidth=image.WindowWidth)
    return own


def _dimensions(made):
    """Say what the frames are ordered by."""
    uid = generate_uid(entropy_srcs=[made.SOPInstanceUID, "dimensions"])
    made.DimensionOrganizationSequence = _one(DimensionOrganizationUID=uid)
    made.DimensionIndexSequence = Sequence(
        _item(
            DimensionOrganizationUID=uid,
            DimensionIndexPointer=pointer,
            FunctionalGroupPointer=group,
        )
        for pointer, group in (
            (0x00209056, 0x00209111),  # stack
            (0x00209057, 0x00209111),  # position in it
            (0x00189082, 0x00189114),  # echo time
            (0x00089208, 0x00189226),  # component
        )
    )
