"""Captions of emoji scenes: five different sentences an image and language.

English and Vietnamese are written as sentences. The other languages say the same in the style of a picture
catalogue ("links: Katze, rechts: 3 × roter Apfel; blauer Hintergrund"), which needs neither gender nor case.
"""

from __future__ import annotations

from dataclasses import dataclass

from clipgraft.emoji.art import load_art
from clipgraft.emoji.drawing import Group, Scene, Stream


@dataclass(frozen=True)
class Words:
    """The words of one language that captions are put together from.

    A further language is one more entry of `WORDS`, and its CLDR names in `objects.json`.

    Attributes:
        colours: the colour words, in the order of `drawing.COLOURS`.
        grounds: pattern ("plain", "striped", "dotted", "checked") -> background with a `{colour}` field.
        row, column: words for the first, middle and last place.
        counts: how two, three and four of a thing begin.
        picture, et: the words for "picture" and "and".
    """

    colours: tuple[str, ...]
    grounds: dict[str, str]
    row: tuple[str, ...] = ("", "", "")
    column: tuple[str, ...] = ("", "", "")
    counts: tuple[str, str, str] = ("2 × ", "3 × ", "4 × ")
    picture: str = ""
    et: str = ""


def _grounds(plain: str, striped: str, dotted: str, checked: str) -> dict[str, str]:
    return {"plain": plain, "gradient": plain, "striped": striped, "dotted": dotted, "checked": checked}


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split(", "))


WORDS: dict[str, Words] = {
    "en": Words(
        _listed("white, black, red, orange, yellow, green, blue, purple, pink, brown, grey"),
        _grounds(
            "a {colour} background",
            "a striped {colour} background",
            "a dotted {colour} background",
            "a checked {colour} background",
        ),
        counts=("two ", "three ", "four "),
    ),
    "vi": Words(
        _listed("trắng, đen, đỏ, cam, vàng, xanh lá cây, xanh lam, tím, hồng, nâu, xám"),
        _grounds("nền {colour}", "nền kẻ sọc {colour}", "nền chấm bi {colour}", "nền kẻ ô {colour}"),
        counts=("hai ", "ba ", "bốn "),
    ),
    "fr": Words(
        _listed("blanc, noir, rouge, orange, jaune, vert, bleu, violet, rose, marron, gris"),
        _grounds(
            "fond {colour}", "fond {colour} à rayures", "fond {colour} à pois", "fond {colour} à carreaux"
        ),
        row=_listed("à gauche, au milieu, à droite"),
        column=_listed("en haut, au milieu, en bas"),
        picture="image",
        et="et",
    ),
    "de": Words(
        _listed("weiß, schwarz, rot, orange, gelb, grün, blau, lila, rosa, braun, grau"),
        _grounds(
            "Hintergrund {colour}",
            "Hintergrund {colour} gestreift",
            "Hintergrund {colour} gepunktet",
            "Hintergrund {colour} kariert",
        ),
        row=_listed("links, in der Mitte, rechts"),
        column=_listed("oben, in der Mitte, unten"),
        picture="Bild",
        et="und",
    ),
    "es": Words(
        _listed("blanco, negro, rojo, naranja, amarillo, verde, azul, morado, rosa, marrón, gris"),
        _grounds(
            "fondo {colour}",
            "fondo {colour} a rayas",
            "fondo {colour} con lunares",
            "fondo {colour} a cuadros",
        ),
        row=_listed("a la izquierda, en el centro, a la derecha"),
        column=_listed("arriba, en el centro, abajo"),
        picture="imagen",
        et="y",
    ),
    "pt": Words(
        _listed("branco, preto, vermelho, laranja, amarelo, verde, azul, roxo, rosa, marrom, cinza"),
        _grounds(
            "fundo {colour}", "fundo {colour} listrado", "fundo {colour} de bolinhas", "fundo {colour} xadrez"
        ),
        row=_listed("à esquerda, no meio, à direita"),
        column=_listed("em cima, no meio, embaixo"),
        picture="imagem",
        et="e",
    ),
    "id": Words(
        _listed("putih, hitam, merah, oranye, kuning, hijau, biru, ungu, merah muda, cokelat, abu-abu"),
        _grounds(
            "latar {colour}",
            "latar {colour} bergaris",
            "latar {colour} berbintik",
            "latar {colour} kotak-kotak",
        ),
        row=_listed("di kiri, di tengah, di kanan"),
        column=_listed("di atas, di tengah, di bawah"),
        counts=("dua ", "tiga ", "empat "),
        picture="gambar",
        et="dan",
    ),
    "tr": Words(
        _listed("beyaz, siyah, kırmızı, turuncu, sarı, yeşil, mavi, mor, pembe, kahverengi, gri"),
        _grounds(
            "{colour} arka plan",
            "çizgili {colour} arka plan",
            "puantiyeli {colour} arka plan",
            "kareli {colour} arka plan",
        ),
        row=_listed("solda, ortada, sağda"),
        column=_listed("üstte, ortada, altta"),
        counts=("iki ", "üç ", "dört "),
        picture="resim",
        et="ve",
    ),
    "el": Words(
        _listed("λευκό, μαύρο, κόκκινο, πορτοκαλί, κίτρινο, πράσινο, μπλε, μοβ, ροζ, καφέ, γκρι"),
        _grounds("{colour} φόντο", "{colour} ριγέ φόντο", "{colour} πουά φόντο", "{colour} καρό φόντο"),
        row=_listed("αριστερά, στη μέση, δεξιά"),
        column=_listed("επάνω, στη μέση, κάτω"),
        picture="εικόνα",
        et="και",
    ),
}

LANGUAGES: tuple[str, ...] = tuple(WORDS)

# One caption comes from each of the five sets, so that the five of an image always differ. Fields: a, b, c
# the groups; is_a and so on the verb that agrees; bg the background with its pattern; colour only its colour.
Sets = tuple[tuple[str, ...], ...]

_ENGLISH: dict[str, Sets] = {
    "alone": (
        ("{a} on {bg}", "a picture of {a} on {bg}"),
        ("on {bg} there {is_a} {a}", "there {is_a} {a} on {bg}"),
        ("only {a}, {colour} background", "{a} and nothing else, {colour} background"),
        ("{bg} with {a}", "{bg} that shows {a}"),
        ("{a} alone", "nothing but {a}"),
    ),
    "row2": (
        ("{a} to the left of {b} on {bg}", "on {bg}, {b} to the right of {a}"),
        ("{a} {is_a} left of {b}", "{b} {is_b} right of {a}"),
        ("a picture of {a} and {b} on {bg}", "{bg} with {b} and {a}"),
        ("{a} on the left, {b} on the right, {colour} background", "{b} beside {a}, {colour} background"),
        ("on the left {a}, on the right {b}", "on the right {b}, on the left {a}"),
    ),
    "column2": (
        ("{a} above {b} on {bg}", "on {bg}, {b} below {a}"),
        ("{a} {is_a} over {b}", "{b} {is_b} under {a}"),
        ("a picture of {a} and {b} on {bg}", "{bg} with {b} and {a}"),
        ("{a} at the top, {b} at the bottom, {colour} background", "{b} beneath {a}, {colour} background"),
        ("above {a}, below {b}", "at the bottom {b}, at the top {a}"),
    ),
    "row3": (
        ("{a}, {b} and {c} in a row on {bg}", "on {bg}, from left to right, {a}, {b} and {c}"),
        ("{b} {is_b} between {a} and {c}", "{a} {is_a} left of {b}, {c} {is_c} right of {b}"),
        ("a picture of {a}, {b} and {c} on {bg}", "{bg} with {c}, {a} and {b}"),
        ("{a} on the left, {c} on the right, {colour} background", "{b} next to {c}, {colour} background"),
        ("from left to right: {a}, {b}, {c}", "left {a}, middle {b}, right {c}"),
    ),
    "column3": (
        ("{a}, {b} and {c} in a column on {bg}", "on {bg}, from top to bottom, {a}, {b} and {c}"),
        ("{b} {is_b} below {a} and above {c}", "{a} {is_a} above {b}, {c} {is_c} below {b}"),
        ("a picture of {a}, {b} and {c} on {bg}", "{bg} with {c}, {a} and {b}"),
        ("{a} at the top, {c} at the bottom, {colour} background", "{c} below {b}, {colour} background"),
        ("from top to bottom: {a}, {b}, {c}", "top {a}, middle {b}, bottom {c}"),
    ),
}

_VIETNAMESE: dict[str, Sets] = {
    "alone": (
        ("{a} trên {bg}", "bức ảnh chụp {a} trên {bg}"),
        ("trên {bg} có {a}", "có {a} ở trên {bg}"),
        ("chỉ có {a}, nền màu {colour}", "{a} và không còn gì khác, nền màu {colour}"),
        ("{bg} với {a}", "{bg} cùng {a}"),
        ("chỉ {a}", "không có gì ngoài {a}"),
    ),
    "row2": (
        ("{a} ở bên trái {b}, trên {bg}", "trên {bg}, {b} ở bên phải {a}"),
        ("{a} nằm bên trái {b}", "{b} nằm bên phải {a}"),
        ("bức ảnh có {a} và {b} trên {bg}", "{bg} với {b} và {a}"),
        ("{a} bên trái, {b} bên phải, nền màu {colour}", "{b} bên cạnh {a}, nền màu {colour}"),
        ("bên trái là {a}, bên phải là {b}", "bên phải là {b}, còn bên trái là {a}"),
    ),
    "column2": (
        ("{a} ở phía trên {b}, trên {bg}", "trên {bg}, {b} ở phía dưới {a}"),
        ("{a} nằm trên {b}", "{b} nằm dưới {a}"),
        ("bức ảnh có {a} và {b} trên {bg}", "{bg} với {b} và {a}"),
        ("{a} ở trên cùng, {b} ở dưới cùng, nền màu {colour}", "{b} ngay dưới {a}, nền màu {colour}"),
        ("phía trên là {a}, phía dưới là {b}", "bên dưới là {b}, còn bên trên là {a}"),
    ),
    "row3": (
        ("{a}, {b} và {c} xếp thành hàng ngang trên {bg}", "trên {bg}, từ trái sang phải có {a}, {b} và {c}"),
        ("{b} ở giữa {a} và {c}", "{a} ở bên trái {b}, {c} ở bên phải {b}"),
        ("bức ảnh có {a}, {b} và {c} trên {bg}", "{bg} với {c}, {a} và {b}"),
        ("{a} bên trái, {c} bên phải, nền màu {colour}", "{b} bên cạnh {c}, nền màu {colour}"),
        ("từ trái sang phải: {a}, {b}, {c}", "bên trái {a}, ở giữa {b}, bên phải {c}"),
    ),
    "column3": (
        ("{a}, {b} và {c} xếp thành hàng dọc trên {bg}", "trên {bg}, từ trên xuống dưới có {a}, {b} và {c}"),
        ("{b} ở dưới {a} và ở trên {c}", "{a} ở phía trên {b}, {c} ở phía dưới {b}"),
        ("bức ảnh có {a}, {b} và {c} trên {bg}", "{bg} với {c}, {a} và {b}"),
        ("{a} ở trên cùng, {c} ở dưới cùng, nền màu {colour}", "{c} ngay dưới {b}, nền màu {colour}"),
        ("từ trên xuống dưới: {a}, {b}, {c}", "trên cùng {a}, ở giữa {b}, dưới cùng {c}"),
    ),
}

# For the other languages; first, middle, last are that language's words for the places.
_CATALOGUE: dict[str, Sets] = {
    "1": (("{a}, {bg}",), ("{bg}: {a}",), ("{picture}: {a}, {bg}",), ("{picture} ({bg}): {a}",), ("{a}",)),
    "2": (
        ("{first}: {a}, {last}: {b}; {bg}", "{bg}; {last}: {b}, {first}: {a}"),
        ("{first} {a}, {last} {b}", "{last} {b}, {first} {a}"),
        ("{picture}: {a} {et} {b}, {bg}", "{picture} ({bg}): {b} {et} {a}"),
        ("{a} {et} {b}, {bg}", "{b} {et} {a}; {bg}"),
        ("{a} ({first}) {et} {b} ({last})", "{b} ({last}) {et} {a} ({first})"),
    ),
    "3": (
        ("{first}: {a}, {middle}: {b}, {last}: {c}; {bg}", "{bg}; {first}: {a}, {middle}: {b}, {last}: {c}"),
        ("{first} {a}, {middle} {b}, {last} {c}", "{middle} {b}, {first} {a}, {last} {c}"),
        ("{picture}: {a}, {b} {et} {c}, {bg}", "{picture} ({bg}): {c}, {a} {et} {b}"),
        ("{a}, {b} {et} {c}, {bg}", "{c}, {b} {et} {a}; {bg}"),
        (
            "{a} ({first}), {b} ({middle}) {et} {c} ({last})",
            "{c} ({last}), {b} ({middle}) {et} {a} ({first})",
        ),
    ),
}


def name_group(group: Group, language: str) -> str:
    """A group as a noun phrase: "three red apples", "ba quả táo đỏ", "3 × pomme rouge"."""
    thing, words = load_art().objects[group.index], WORDS[language]
    if language == "en":
        return thing.english[0] if group.count == 1 else words.counts[group.count - 2] + thing.english[1]
    if language == "vi":
        return ("một ", *words.counts)[group.count - 1] + thing.vietnamese
    return ("", *words.counts)[group.count - 1] + thing.names[language]


def _sets(scene: Scene, language: str) -> Sets:
    kinds = len(scene.groups)
    if language not in ("en", "vi"):
        return _CATALOGUE[str(kinds)]
    table = _ENGLISH if language == "en" else _VIETNAMESE
    return table["alone" if kinds == 1 else f"{scene.layout}{kinds}"]


def describe(scene: Scene, key: str, language: str) -> tuple[str, ...]:
    """Five different captions of a scene, NFC; `key` decides which sentence of each set is taken."""
    words = WORDS[language]
    colour = words.colours[WORDS["en"].colours.index(scene.colour)]
    places = words.column if scene.layout == "column" else words.row
    ground = words.grounds[scene.pattern].format(colour=colour)
    fields = {
        "colour": colour,
        "bg": ground.replace("a orange", "an orange"),
        "picture": words.picture,
        "et": words.et,
        **dict(zip(("first", "middle", "last"), places, strict=True)),
    }
    for letter, group in zip("abc", scene.groups, strict=False):
        fields[letter] = name_group(group, language)
        fields[f"is_{letter}"] = "is" if group.count == 1 else "are"
    stream = Stream(f"captions/{language}/{key}")
    sets = _sets(scene, language)
    return tuple(sentences[stream.below(len(sentences))].format(**fields) for sentences in sets)
