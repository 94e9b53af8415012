"""Facts and questions in German, French and Spanish, in whatever prose there is: best in a haystack of that language."""

from __future__ import annotations

from functools import partial

from keepkv.eval.tasks.facts import Fact, each_asked
from keepkv.eval.tasks.needles import NAMES
from keepkv.eval.tasks.task import twice

CITIES = ["Oslo", "Quito", "Riga", "Hanoi", "Accra", "Lima", "Perth", "Sofia", "Kyoto"]  # the same in every language
YEARS = [str(year) for year in range(1400, 1700)]

GERMAN = (
    Fact(
        "Der Hafenmeister streicht sein Boot in der Farbe {}.",
        "In welcher Farbe streicht der Hafenmeister sein Boot?",
        "Welchen Ton mag der Leiter des Kais für sein Schiff?",
        ["Türkis", "Purpur", "Violett", "Orange", "Silber", "Beige"],
    ),
    Fact(
        "Die magische Zahl des Leuchtturms ist {}.",
        "Was ist die magische Zahl des Leuchtturms?",
        "Welche Ziffern gelten im Gebäude mit dem großen Licht am Meer als verzaubert?",
        [],
    ),
    Fact(
        "Der Esel des Schmieds heißt {}.",
        "Wie heißt der Esel des Schmieds?",
        "Welchen Namen trägt das Lasttier des Mannes, der Eisen bearbeitet?",
        NAMES,
    ),
    Fact(
        "Der Erfinder des Dampfklaviers wurde in {} geboren.",
        "Wo wurde der Erfinder des Dampfklaviers geboren?",
        "Aus welcher Stadt stammt der Mann, der sich das neue Instrument ausgedacht hat?",
        CITIES,
    ),
    Fact(
        "Das Passwort des Nachtwächters lautet {}.",
        "Wie lautet das Passwort des Nachtwächters?",
        "Welche geheime Losung muss man dem Aufpasser am Abend sagen?",
        ["Hafen", "Geige", "Kupfer", "Wiese", "Laterne", "Pfeffer"],
    ),
    Fact(
        "Das Lieblingsgericht des Zirkusdirektors ist {}.",
        "Was ist das Lieblingsgericht des Zirkusdirektors?",
        "Welches Essen mag der Chef der Manege am meisten?",
        ["Linsensuppe", "Entenbraten", "Apfelkuchen", "Forelle", "Zwiebelbrot", "Pflaumenmus"],
    ),
    Fact(
        "Der Zwillingsbruder des Imkers arbeitet als {}.",
        "Als was arbeitet der Zwillingsbruder des Imkers?",
        "Welchen Beruf hat der Verwandte des Mannes mit den Bienen?",
        ["Bäcker", "Tischler", "Chirurg", "Pilot", "Anwalt", "Maler", "Lehrer", "Klempner"],
    ),
    Fact(
        "Der alte Uhrturm wurde im Jahr {} fertig.",
        "In welchem Jahr wurde der alte Uhrturm fertig?",
        "Wann war das historische Gebäude, das die Zeit anzeigt, vollendet?",
        YEARS,
    ),
)

FRENCH = (
    Fact(
        "Le maître du port peint son bateau en {}.",
        "De quelle couleur le maître du port peint-il son bateau ?",
        "Quelle teinte le chef des quais choisit-il pour son navire ?",
        ["turquoise", "pourpre", "violet", "orange", "argent", "beige"],
    ),
    Fact(
        "Le nombre magique du phare est {}.",
        "Quel est le nombre magique du phare ?",
        "Quels chiffres sont enchantés dans le bâtiment avec la grande lumière ?",
        [],
    ),
    Fact(
        "L'âne du forgeron s'appelle {}.",
        "Comment s'appelle l'âne du forgeron ?",
        "Quel nom a la bête de l'homme qui bat le fer ?",
        NAMES,
    ),
    Fact(
        "L'inventeur du piano à vapeur est né à {}.",
        "Où est né l'inventeur du piano à vapeur ?",
        "De quelle ville vient l'homme qui a imaginé le nouvel instrument ?",
        CITIES,
    ),
    Fact(
        "Le mot de passe du veilleur de nuit est {}.",
        "Quel est le mot de passe du veilleur de nuit ?",
        "Quel terme secret faut-il dire au gardien le soir ?",
        ["violon", "cuivre", "prairie", "lanterne", "poivre", "château"],
    ),
    Fact(
        "Le plat préféré du directeur du cirque est le {}.",
        "Quel est le plat préféré du directeur du cirque ?",
        "Que mange le plus volontiers le patron du chapiteau ?",
        ["cassoulet", "couscous", "gratin", "soufflé", "taboulé", "rôti"],
    ),
    Fact(
        "Le frère jumeau de l'apiculteur travaille comme {}.",
        "Comme quoi travaille le frère jumeau de l'apiculteur ?",
        "Quel métier exerce le proche parent de l'homme aux abeilles ?",
        ["boulanger", "menuisier", "chirurgien", "pilote", "avocat", "peintre", "plombier"],
    ),
    Fact(
        "La vieille tour de l'horloge fut achevée en {}.",
        "En quelle année la vieille tour de l'horloge fut-elle achevée ?",
        "Quand a-t-on terminé l'ancien bâtiment qui donne l'heure ?",
        YEARS,
    ),
)

SPANISH = (
    Fact(
        "El capitán del puerto pinta su barco de color {}.",
        "¿De qué color pinta su barco el capitán del puerto?",
        "¿Qué tono prefiere el jefe del muelle para su nave?",
        ["turquesa", "púrpura", "violeta", "naranja", "plateado", "beige"],
    ),
    Fact(
        "El número mágico del faro es {}.",
        "¿Cuál es el número mágico del faro?",
        "¿Qué cifras están encantadas en el edificio de la gran luz?",
        [],
    ),
    Fact(
        "El burro del herrero se llama {}.",
        "¿Cómo se llama el burro del herrero?",
        "¿Qué nombre lleva el animal del hombre que forja el metal?",
        NAMES,
    ),
    Fact(
        "El inventor del piano de vapor nació en {}.",
        "¿Dónde nació el inventor del piano de vapor?",
        "¿De qué ciudad viene el hombre que ideó el nuevo instrumento?",
        CITIES,
    ),
    Fact(
        "La contraseña del vigilante nocturno es {}.",
        "¿Cuál es la contraseña del vigilante nocturno?",
        "¿Qué palabra secreta hay que decirle al guardia cuando oscurece?",
        ["violín", "cobre", "pradera", "linterna", "pimienta", "castillo"],
    ),
    Fact(
        "El plato favorito del director del circo es {}.",
        "¿Cuál es el plato favorito del director del circo?",
        "¿Qué comida le gusta más al dueño de la carpa?",
        ["gazpacho", "paella", "cocido", "tortilla", "ceviche", "empanada"],
    ),
    Fact(
        "El hermano gemelo del apicultor trabaja de {}.",
        "¿De qué trabaja el hermano gemelo del apicultor?",
        "¿Qué oficio tiene el pariente del hombre de las abejas?",
        ["panadero", "carpintero", "cirujano", "piloto", "abogado", "pintor", "maestro", "fontanero"],
    ),
    Fact(
        "La vieja torre del reloj se terminó en el año {}.",
        "¿En qué año se terminó la vieja torre del reloj?",
        "¿Cuándo quedó listo el antiguo edificio que da la hora?",
        YEARS,
    ),
)

LANGUAGES = {"german": GERMAN, "french": FRENCH, "spanish": SPANISH}

TASKS = tuple(
    task
    for name, facts in LANGUAGES.items()
    for task in twice(f"facts-{name}", f"eight facts in {name.title()}", partial(each_asked, facts=facts, ending=""))
)
