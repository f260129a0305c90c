"""The unwanted and neutral conditions of a run: prepared as ComfyUI's guider prepares its own, and evaluated in one batch with them."""
import comfy.hooks
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers

from .separate_calls import Apart, why_apart

KEY, HANDLER, FUNCTION = "safe_denoiser_conditions", "context_handler", "model_function_wrapper"
SHOWN = ("concat_latent_image", "concat_mask", "reference_latents", "clip_vision_output", "vace_frames", "vace_mask", "vace_strength")


def hookable(model, conditionings: list):
    """A clone of `model` whose weights hooks can change. Where newer ComfyUI loads weights piecewise they cannot, and it does as here."""
    if getattr(model, "is_dynamic", lambda: False)() and any(map(comfy.sampler_helpers.cond_has_hooks, conditionings)):
        return model.get_non_dynamic_delegate()
    return model.clone()


class Conditions:
    """Our conditions of one run, by the id of the CONDITIONING each came from: where patches on one model share it, it is evaluated once.

    They pass through the same stages as CFGGuider's own, but never in one list with them: ComfyUI gives each condition the areas of the
    others in its list, and the guider's own predictions must not change.
    """

    def __init__(self):
        self.given: dict[int, list[dict]] = {}
        self.processed: dict[int, list[dict]] = {}
        self.apart: Apart | None = None  # where they cannot be in the guider's own batch
        self.prompt: list[dict] | None = None  # of the guider's own conditions, the one that guidance takes for the prompt

    def add(self, guider, conditionings: list, hook_mode) -> None:
        """Do for these what CFGGuider.sample does for its own before models are loaded."""
        self.given |= {id(one): comfy.sampler_helpers.convert_cond(one) for one in conditionings if id(one) not in self.given}
        comfy.samplers.preprocess_conds_hooks(self.given)
        self._register_hooks(guider)
        comfy.samplers.filter_registered_hooks_on_conds(self.given, guider.model_options)
        if comfy.samplers.get_total_hook_groups_in_conds(guider.conds | self.given) > 1:
            guider.model_patcher.hook_mode = hook_mode

    def _register_hooks(self, guider) -> None:
        """`prepare_model_patcher` for hooks that the guider's own conditions lack; itself it would add all wrappers once more."""
        options, known, hooks = guider.model_options, comfy.hooks.HookGroup(), comfy.hooks.HookGroup()
        for conds in (guider.conds | self.given).values():
            comfy.sampler_helpers.get_hooks_from_cond([cond for cond in conds if cond.get("hooks") is not None], hooks)
        for hook in options["registered_hooks"].hooks if "registered_hooks" in options else ():
            known.add(hook)
        fresh = [hook for hook in hooks.hooks if not known.contains(hook)]
        if not fresh:
            return
        target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
        for hook in fresh:
            if hook.hook_type in (comfy.hooks.EnumHookType.TransformerOptions, comfy.hooks.EnumHookType.AdditionalModels):
                hook.add_hook_patches(guider.model_patcher, options, target, known)
        guider.model_patcher.register_all_hook_patches(hooks, target, options, known)  # all weights anew: it starts from none
        options["registered_hooks"] = known

    def process(self, guider, noise, latent_image, denoise_mask, seed, model_options: dict) -> None:
        """Do for these what CFGGuider.inner_sample does for its own before the sampler starts; of several patches the first does it."""
        if self.processed:
            return
        model, positive = guider.inner_model, guider.conds.get("positive") or next(iter(guider.conds.values()), None) or []
        shapes = getattr(model, "latent_shapes", None)  # newer ComfyUI: of latents that hold several streams
        more = {} if shapes is None else {"latent_shapes": shapes}
        shown = {name: positive[0][name] for name in SHOWN if positive and name in positive[0]}
        for key, conds in self.given.items():
            name = f"{KEY} {key}"
            conds = comfy.samplers.process_conds(model, noise, {name: [{**shown, **cond} for cond in conds]}, noise.device, latent_image,
                                                 denoise_mask, seed, **more)[name]
            for own in guider.conds.values():
                for cond in own:
                    comfy.samplers.create_cond_with_same_area_if_none(conds, cond)
            self.processed[key] = self._controlled(conds, positive)
        self.look(model, guider, model_options)

    def look(self, model, guider, model_options: dict) -> None:
        """See whether they need calls of their own: by the options of the run, or of one call, which guidance of other packs may change."""
        if not self.apart and (why := why_apart(model, guider.model_patcher, model_options)):
            self.apart = Apart(model, model_options, self.given, why)

    @staticmethod
    def _controlled(conds: list[dict], positive: list[dict]) -> list[dict]:
        """Conditions without a ControlNet or boxes of their own under the positive prompt's: it is the same picture that they judge."""
        for name in ("control", "gligen"):
            found = next((cond[name] for cond in positive if cond.get(name) is not None), None)
            if found is not None and not any(cond.get(name) is not None for cond in conds):
                conds = [{**cond, name: found} for cond in conds]
        return conds


def outer_sample(conditionings: list, hook_mode):
    """A wrapper of OUTER_SAMPLE that gives the run these conditions, and takes them away when it ends, however it ends."""
    def wrapper(executor, *args, **kwargs):
        guider = executor.class_obj
        mine = KEY not in guider.model_options
        conditions = guider.model_options.setdefault(KEY, Conditions())
        try:
            conditions.add(guider, conditionings, hook_mode)
            return executor(*args, **kwargs)
        finally:
            if mine:
                comfy.sampler_helpers.cleanup_models(conditions.given, [])
                guider.model_options.pop(KEY, None)

    return wrapper


def prepare_sampling(executor, model, noise_shape, conds, *args, **kwargs):
    """A wrapper of PREPARE_SAMPLING: ComfyUI loads the models that these conditions bring, such as ControlNets, and counts their memory."""
    conditions = (kwargs.get("model_options") or {}).get(KEY)
    given = {} if conditions is None else {f"{KEY} {key}": found for key, found in conditions.given.items()}
    real, found, models = executor(model, noise_shape, conds | given, *args, **kwargs)
    return real, {name: found[name] for name in found if name not in given}, models


def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    """A wrapper of APPLY_MODEL: to patches inside the model each of these conditions looks like the positive prompt. They look up what to
    do by place in the batch, and many know two places only.
    """
    seen_as = (transformer_options or {}).get(KEY)
    if seen_as:
        transformer_options["cond_or_uncond"] = [seen_as.get(i, i) for i in transformer_options["cond_or_uncond"]]
    return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


def listen(model, given: dict[str, list]) -> None:
    """Wrap a clone of a model so that each of its runs has these conditions too; `given` is CONDITIONING by name."""
    wrappers = comfy.patcher_extension.WrappersMP
    if given:
        model.add_wrapper_with_key(wrappers.OUTER_SAMPLE, KEY, outer_sample([*given.values()], model.hook_mode))
        model.add_wrapper_with_key(wrappers.PREPARE_SAMPLING, KEY, prepare_sampling)
        model.add_wrapper_with_key(wrappers.APPLY_MODEL, KEY, apply_model)
