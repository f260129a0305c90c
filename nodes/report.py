"""Safe Denoiser Report: what the guidance did, as a picture and as text."""
from comfy_api.latest import io, ui

from .io_types import CATEGORY, NegationSetType, ReportType, found_by
from .pictures.negation_set import preview_input, to_image
from .steering.remembered_runs import recall


class SafeDenoiserReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserReport", display_name="Safe Denoiser Report", category=CATEGORY, is_output_node=True,
            **found_by("safety report", "what was censored"),
            description="Posterior P(unsafe) and size of the correction at each step, what was clamped, and why a run did nothing.",
            inputs=[
                ReportType.Input("report", tooltip="From Safe KSampler or Apply Safe Denoiser."),
                io.Latent.Input("samples", optional=True,
                                tooltip="The sampled latent. Needed with Apply Safe Denoiser, so that the report is read after sampling."),
                NegationSetType.Input("negation_set", optional=True,
                                      tooltip="The set of the bank: the three pictures that pushed most are shown. Optional."),
                preview_input("The three pictures that pushed most, when negation_set is connected. Blurred by default, since sets hold "
                              "what people do not want to see. off: they are not shown.", optional=True),
            ],
            outputs=[io.Image.Output(display_name="plot", tooltip="Posterior and correction over the model calls, one line per picture."),
                     io.String.Output(display_name="table", tooltip="One line per step.")],
        )

    @classmethod
    def execute(cls, report, samples=None, negation_set=None, preview="blurred") -> io.NodeOutput:
        report = report if samples is None else recall(report, samples["samples"])
        picture = report.plot(negation_set=None if preview == "off" else negation_set, blurred=preview != "shown")
        plot, table = to_image(picture), report.table()
        return io.NodeOutput(plot, table, ui={**ui.PreviewImage(plot, cls=cls).as_dict(), "text": (table,)})


NODES = [SafeDenoiserReport]
