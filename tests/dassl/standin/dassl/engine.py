class Registry:
    def __init__(self):
        self._obj_map = {}

    def register(self, obj=None, force=False):
        if obj is None:
            return lambda later: self.register(later, force) or later
        if obj.__name__ in self._obj_map and not force:
            raise KeyError(obj.__name__)
        self._obj_map[obj.__name__] = obj

    def get(self, name):
        return self._obj_map[name]

    def registered_names(self):
        return list(self._obj_map)


TRAINER_REGISTRY = Registry()


def build_trainer(cfg):
    return TRAINER_REGISTRY.get(cfg.TRAINER.NAME)(cfg)
